package netstack

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// scriptedPing answers for one host, and records.
type scriptedPing struct {
	alive netip.Addr
	mu    sync.Mutex
	asked map[netip.Addr]int // payload sizes
}

func (s *scriptedPing) ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked == nil {
		s.asked = make(map[netip.Addr]int)
	}
	s.asked[dst] = len(payload)
	if dst != s.alive {
		return errors.New("no answer")
	}
	return nil
}

// last returns how many bytes a host was last asked with.
func (s *scriptedPing) last(dst netip.Addr) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[dst]
}

// ping sends an echo request from the namespace.
func (b *bed) ping(dst string, n int, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	b.inside(func() {
		os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
		err = new(Pinger).Ping(ctx, netip.MustParseAddr(dst), bytes.Repeat([]byte("p"), n))
	})
	return err
}

func TestEchoIsAnsweredWhenTheHostAnswers(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, host := range []string{host4, host6} {
		s := &scriptedPing{alive: netip.MustParseAddr(host)}
		b := newBed(t, new(proxytest.RecordingHandler), func(st *Stack) { st.Ping = s.ping }, tundev.Options{})
		for _, n := range []int{56, 0, 4000} { // the last comes in fragments
			if err := b.ping(host, n, proxytest.Patience); err != nil {
				t.Errorf("%d bytes to %s: %v", n, host, err)
			}
			if got := s.last(s.alive); got != n {
				t.Errorf("%s was asked with %d bytes, want %d", host, got, n)
			}
		}
		other := netip.MustParseAddr(host).Next()
		if err := b.ping(other.String(), 56, 300*time.Millisecond); err == nil {
			t.Errorf("%v has answered", other)
		}
	}
}

func TestEchoWithoutPing(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBed(t, new(proxytest.RecordingHandler), nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		if err := b.ping(host, 56, 200*time.Millisecond); err == nil {
			t.Errorf("%s has answered", host)
		}
	}
}
