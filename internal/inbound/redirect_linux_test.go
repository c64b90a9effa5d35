package inbound

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// recordingCapture says what was asked of it.
type recordingCapture struct {
	err error // of Begin

	mu    sync.Mutex
	at    []netip.AddrPort
	calls []string
}

func (r *recordingCapture) call(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, name)
}

func (r *recordingCapture) Begin(at []netip.AddrPort) error {
	r.call("begin")
	r.at = at
	return r.err
}

func (r *recordingCapture) Stop() error { r.call("stop"); return nil }
func (r *recordingCapture) End() error  { r.call("end"); return nil }

func (r *recordingCapture) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.calls, " ")
}

// TestRedirectBoth: at the IPv4 loopback address it listens at that of IPv6, with one port; and what was set up is
// undone when the last session is over, or at Close where there never was one.
func TestRedirectBoth(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, serve := range []bool{false, true} {
		k := new(recordingCapture)
		r := &Redirect{Listener: Listener{Name: "r", Addr: proxy.TCP("127.0.0.1", 0)}, Capture: k}
		if err := r.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		port := addrPort(r.BoundAddr()).Port()
		want := []netip.AddrPort{
			netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), netip.AddrPortFrom(netip.IPv6Loopback(), port)}
		if !slices.Equal(k.at, want) {
			t.Errorf("it listens at %v, not at %v", k.at, want)
		}
		if !serve {
			r.Close()
			r.Close()
			if got := k.said(); got != "begin end" {
				t.Errorf("without Serve: %s", got)
			}
			continue
		}
		ended := make(chan error, 1)
		go func() { ended <- r.Serve(context.Background(), &proxytest.RecordingHandler{}) }()
		proxytest.Until(t, "it serves", func() bool {
			r.t.mu.Lock()
			defer r.t.mu.Unlock()
			return r.t.serving
		})
		r.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := k.said(); got != "begin stop end" {
			t.Errorf("with Serve: %s", got)
		}
	}
}

// TestRedirectCaptureFails: then nobody listens.
func TestRedirectCaptureFails(t *testing.T) {
	proxytest.NoLeaks(t)
	bad := errors.New("bad")
	r := &Redirect{Listener: Listener{Addr: proxy.TCP("127.0.0.1", 0)}, Capture: &recordingCapture{err: bad}}
	if err := r.Listen(t.Context()); !errors.Is(err, bad) {
		t.Errorf("got %v", err)
	}
	unix := &Redirect{Listener: Listener{Addr: proxy.Addr{Network: "unix", Host: "@x"}}}
	if err := unix.Listen(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("at a Unix socket: %v", err)
	}
}

// countingHandler carries each stream until its client closes it, and says how many there were at a time.
type countingHandler struct {
	noPackets
	now, most atomic.Int32
	began     chan struct{}
}

type noPackets struct{}

func (noPackets) HandlePackets(context.Context, proxy.Flow, relay.PacketConn) {}

func (h *countingHandler) HandleStream(_ context.Context, _ proxy.Flow, p proxy.Pending) {
	if n := h.now.Add(1); n > h.most.Load() {
		h.most.Store(n)
	}
	h.began <- struct{}{}
	if c, _, err := p.Accept(); err == nil {
		io.Copy(io.Discard, c)
		c.Close()
	}
	h.now.Add(-1)
	p.Done()
}

// TestMaxConnsIsOfTheInbound: IPv4 and IPv6 clients of an inbound count together, whichever of its listeners they come to.
func TestMaxConnsIsOfTheInbound(t *testing.T) {
	proxytest.NoLeaks(t)
	const most, clients = 2, 8
	h := &countingHandler{began: make(chan struct{}, clients)}
	r := &Redirect{Listener: Listener{Addr: proxy.TCP("127.0.0.1", 0), MaxConns: most}}
	if err := r.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.t.destination = func(*client) (netip.AddrPort, error) { return netip.MustParseAddrPort("192.0.2.1:80"), nil }
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(context.Background(), h) }()
	var conns []net.Conn
	for i := range clients {
		c, err := net.Dial("tcp", r.t.at[i%len(r.t.at)].String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	for i := range clients {
		<-h.began
		if i >= most-1 {
			time.Sleep(20 * time.Millisecond) // for one too many to be seen
		}
		if i == most-1 {
			for _, c := range conns { // as each ends another begins
				c.Close()
			}
		}
	}
	r.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := h.most.Load(); n > most+1 { // both listeners may have accepted for the last slot
		t.Errorf("%d clients at a time", n)
	}
}

// TestRedirectDirect: who connects to the port itself has no destination. That is said once, however often it happens.
func TestRedirectDirect(t *testing.T) {
	proxytest.NoLeaks(t)
	var log logBuffer
	h := &proxytest.RecordingHandler{}
	r := &Redirect{Listener: Listener{Addr: proxy.TCP("127.0.0.1", 0), Log: log.logger()}}
	if err := r.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(context.Background(), h) }()
	for _, at := range r.t.at {
		for range 3 {
			c, err := net.Dial("tcp", at.String())
			if err != nil {
				if !errors.Is(err, syscall.ECONNRESET) { // it may be that soon
					t.Error(err)
				}
				continue
			}
			if !proxytest.Resets(c) {
				t.Errorf("at %v it is not reset", at)
			}
			c.Close()
		}
	}
	r.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := log.count("client refused"); n != 1 || len(h.Flows()) != 0 {
		t.Errorf("said %d times, %d flows", n, len(h.Flows()))
	}
}
