package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// answering answers only the datagrams to port 53. It says why the context of each session ended.
type answering struct {
	proxytest.RecordingHandler
	ended chan error
}

func (a *answering) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	if f.Dst.Port == 53 {
		a.RecordingHandler.HandlePackets(ctx, f, c)
		return
	}
	<-ctx.Done()
	c.Close()
	a.ended <- context.Cause(ctx)
}

func datagram4(src, dst netip.AddrPort) []byte {
	return packet4(src.Addr(), dst.Addr(), 17, transport(src, dst, 0, true, []byte("x")))
}

// Sources that do not exist take all places, and keep them from nobody for longer than a moment. Who was answered stays.
func TestSpoofedSourcesGiveWay(t *testing.T) {
	proxytest.NoLeaks(t)
	const most = 20
	h := &answering{ended: make(chan error, 1000)}
	g := newRig(t, h, func(s *Stack) { s.MaxSessions = most })
	answered := func(src netip.AddrPort) bool {
		g.inject(datagram4(src, ap(host4, 53)))
		for wait := time.After(20 * time.Millisecond); ; {
			select {
			case b := <-g.out:
				if b[0]>>4 == 4 && netip.AddrFrom4([4]byte(b[16:20])) == src.Addr() {
					return true
				}
			case <-wait:
				return false
			}
		}
	}
	first, second := ap("10.77.0.1", 4000), ap("10.77.0.2", 4000)
	proxytest.Until(t, "an answer", func() bool { return answered(first) })
	for i := range byte(200) {
		g.inject(datagram4(netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, i}), 4000), ap(host4, 9)))
	}
	start := time.Now()
	proxytest.Until(t, "an answer for a newcomer", func() bool { return answered(second) })
	if d := time.Since(start); d < answerWait/2 {
		t.Errorf("somebody had to give way after %v", d)
	}
	if err := within(t, "the end of who gave way", h.ended); !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ended for %v", err)
	}
	if f := h.Flows(); len(f) != 2 || f[0].Client != first || f[1].Client != second {
		t.Errorf("%+v", f)
	}
	if !answered(first) || len(h.Flows()) != 2 {
		t.Error("who was answered had to give way")
	}
}
