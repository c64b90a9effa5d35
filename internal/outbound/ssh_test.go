//go:build linux

package outbound_test

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/sshlink"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// sshLink returns a link to s.
func sshLink(t *testing.T, s *proxytest.SSHD) *sshlink.Link {
	t.Helper()
	settings, err := sshlink.ReadSettings(nil, sshlink.Env{}, sshlink.Asked{
		Host: s.Addr.Host, Port: s.Addr.Port, User: "root", IdentityFile: s.UserKey, KnownHosts: s.KnownHosts,
	})
	if err != nil {
		t.Fatal(err)
	}
	l := &sshlink.Link{Name: "ssh://test", Settings: settings}
	t.Cleanup(func() { l.Close() })
	return l
}

// serving serves in until the test's end.
func serving(t *testing.T, in proxy.Inbound, d proxy.Dialer) {
	t.Helper()
	if err := in.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := &proxy.Engine{Router: proxy.Static{Name: "test", Dialer: d}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		in.Serve(context.Background(), e)
	}()
	t.Cleanup(func() {
		in.Close()
		e.Abort()
		<-done
	})
}

// sshCaps is what SSH carries of a TCP connection: all but resets. Its channels have an end for each
// direction, and a close. OpenSSH's server shows a reset origin as an end, and notices a broken one by
// writing to it; what it is to reset it closes, once it has delivered what it holds. So these scenarios
// cannot be kept: reset-idle, reset-sending, reset-receiving, reset-behind-data, reset-after-half-close,
// reset-in-reply, reset-after-reply, data-before-reset.
const sshCaps = relaytest.HalfClose | relaytest.Watch | relaytest.Buffered | relaytest.Urgent

// plays plays all scenarios on b but those named, which SSH cannot carry.
func plays(t *testing.T, b relaytest.Bed, but ...string) {
	t.Helper()
	o := relaytest.Options{Rounds: 50}
	var together sync.WaitGroup
	lanes := make(chan struct{}, 8)
	play := func(s relaytest.Scenario) {
		if v := relaytest.Check(t.Context(), b, s, o); v.Err != nil {
			t.Errorf("%s: %v", s.Name, v.Err)
		}
	}
	played := 0
	for _, alone := range []bool{false, true} {
		for _, s := range relaytest.Scenarios() {
			switch {
			case s.Alone != alone || slices.Contains(but, s.Name) || s.LeftOut(b, o) != "":
				continue
			case alone:
				play(s)
			default:
				lanes <- struct{}{}
				together.Go(func() {
					play(s)
					<-lanes
				})
			}
			played++
		}
		together.Wait()
	}
	if played < 25 {
		t.Errorf("only %d scenarios were played", played)
	}
}

func listenOrigin(t *testing.T) (net.Listener, proxy.Addr) {
	t.Helper()
	origin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { origin.Close() })
	to, err := proxy.ParseDst(origin.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return origin, to
}

func TestSSHConforms(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	origin, to := listenOrigin(t)
	in := &inbound.Forward{Listener: inbound.Listener{Addr: proxy.TCP("127.0.0.1", 0)}, To: to}
	serving(t, in, &outbound.SSH{Link: sshLink(t, s)})
	// A request for a stream cannot be taken back: the server dials on for a client that has left.
	plays(t, &relaytest.Dialed{
		Origin: origin, Connect: relaytest.To("tcp", in.BoundAddr().String()),
		ClientCaps: sshCaps, OriginCaps: sshCaps, Meter: relaytest.InProcess(),
	}, "dial-abandoned")
}

// TestReverseConforms has the client at the server, and the origin here.
func TestReverseConforms(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	origin, to := listenOrigin(t)
	in := &inbound.Reverse{Listener: inbound.Listener{Addr: proxy.TCP("127.0.0.1", 0)}, Link: sshLink(t, s), To: to}
	serving(t, in, &outbound.Direct{})
	// The server does not say that a client which waits has left, and closes one that it is to refuse.
	plays(t, &relaytest.Dialed{
		Origin: origin, Connect: relaytest.To("tcp", in.BoundAddr().String()),
		ClientCaps: sshCaps, OriginCaps: sshCaps, Meter: relaytest.InProcess(),
	}, "dial-abandoned", "origin-refused")
}

// TestLostLinkResetsTheClient: a transfer that the loss of the link cuts short must not look complete.
func TestLostLinkResetsTheClient(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		c.Write([]byte("half a re"))
		proxytest.Sink(c)
	})
	in := &inbound.Forward{Listener: inbound.Listener{Addr: proxy.TCP("127.0.0.1", 0)}, To: origin.Addr}
	serving(t, in, &outbound.SSH{Link: sshLink(t, s)})
	to, err := proxy.ParseDst(in.BoundAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := proxytest.Dial(t, to)
	if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if !proxytest.Resets(c) {
		t.Error("the client saw a clean end")
	}
}

// TestReverseFlows looks at what an inbound at the server tells of its clients.
func TestReverseFlows(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	in := &inbound.Reverse{
		Listener: inbound.Listener{Name: "far", Addr: proxy.TCP("127.0.0.1", 0)}, Link: sshLink(t, s), To: proxy.TCP("origin.test", 1),
	}
	if err := in.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	h := &proxytest.RecordingHandler{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		in.Serve(context.Background(), h)
	}()
	to, err := proxy.ParseDst(in.BoundAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := proxytest.Dial(t, to)
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	f := h.Flows()[0]
	if f.Inbound != "far" || f.Dst != in.To || f.Client.String() != c.LocalAddr().String() {
		t.Errorf("flow %+v of a client at %v", f, c.LocalAddr())
	}
	c.Close()
	in.Close()
	<-done
}
