package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

func TestDatagramsToFakeAddressesGoToNames(t *testing.T) {
	next := new(proxytest.RecordingHandler)
	h := &Handler{names: names{fixed: true}, Next: next}
	ip := fakeOf(t, h, "Example.com")
	c := newClient()
	end := serve(t, h, c, ip.String()+":443")
	for _, to := range []string{ip.String() + ":443", ip.String() + ":444"} {
		c.send(to, []byte(to))
		if got := c.next(t); got.Endpoint != endpoint(to) || string(got.Data) != to {
			t.Errorf("sent to %s, got %q from %v", to, got.Data, got.Endpoint)
		}
	}
	end()
	if flows := next.Flows(); len(flows) != 1 || flows[0].Dst != proxy.UDP("example.com", 443) {
		t.Errorf("flows %+v", flows)
	}
	if e := h.names.byName["example.com"]; e.holds != 0 {
		t.Errorf("the name is held %d times after the end", e.holds)
	}
}

// resolving is a Next that answers from addresses, as a way out does that resolves names itself.
type resolving struct{ from map[string]relay.Endpoint }

func (r *resolving) HandleStream(context.Context, proxy.Flow, proxy.Pending) {}

func (r *resolving) HandlePackets(_ context.Context, _ proxy.Flow, c relay.PacketConn) {
	defer c.Close()
	var p relay.Packet
	defer p.Free()
	for c.ReadPacket(&p) == nil {
		p.Endpoint = r.from[p.Endpoint.String()]
		c.WritePacket(&p)
	}
}

func TestAnswersFromResolvedAddressesComeFromTheFakeOnes(t *testing.T) {
	next := &resolving{from: map[string]relay.Endpoint{
		"a.example:443": endpoint("192.0.2.1:443"), "b.example:443": endpoint("192.0.2.2:443"),
		"b.example:500": endpoint("203.0.113.1:9999"), // somebody else, as hole punching has it
		"192.0.2.2:443": endpoint("192.0.2.2:443"),
	}}
	h := &Handler{names: names{fixed: true}, Next: next}
	a, b := fakeOf(t, h, "a.example"), fakeOf(t, h, "b.example")
	c := newClient()
	defer serve(t, h, c, a.String()+":443")()
	for _, tt := range [][2]string{
		{a.String() + ":443", a.String() + ":443"},
		{b.String() + ":443", b.String() + ":443"},
		{a.String() + ":443", a.String() + ":443"},
		{"192.0.2.2:443", "192.0.2.2:443"},
		{b.String() + ":500", "203.0.113.1:9999"},
	} {
		c.send(tt[0], nil)
		if got := c.next(t); got.Endpoint != endpoint(tt[1]) {
			t.Errorf("to %s: answered from %v, want %s", tt[0], got.Endpoint, tt[1])
		}
	}
}

func TestOneSocketAsksAndSendsEverywhere(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, first := range []string{"10.0.0.53:53", "192.0.2.1:9", "a"} {
		t.Run("first to "+first, func(t *testing.T) {
			next := new(proxytest.RecordingHandler)
			h := &Handler{names: names{fixed: true}, Next: next}
			a, b := fakeOf(t, h, "a.example").String()+":443", fakeOf(t, h, "b.example").String()+":443"
			all := []string{"10.0.0.53:53", "192.0.2.1:9", a, b, "192.0.2.2:9"}
			if first == "a" {
				first = a
			}
			c := newClient()
			end := serve(t, h, c, first)
			query := mustPack(t, newQuestion("b.example.", dns.TypeA))
			c.send(first, query)
			for range 3 {
				for _, to := range all {
					c.send(to, query)
				}
			}
			count := make(map[relay.Endpoint]int)
			for range 1 + 3*len(all) {
				got := c.next(t)
				count[got.Endpoint]++
				if answer := mustUnpack(t, got.Data); answer.Response != (got.Port == 53) {
					t.Errorf("%v sent %v", got.Endpoint, answer)
				}
			}
			for _, to := range all {
				want := 3
				if to == first {
					want = 4
				}
				if n := count[endpoint(to)]; n != want {
					t.Errorf("%d datagrams from %s, want %d", n, to, want)
				}
			}
			end()
			var dsts []string
			for _, f := range next.Flows() {
				dsts = append(dsts, f.Dst.HostPort())
				if name, ok := h.NameOf(f.Local.Addr()); f.Local.Port() != f.Dst.Port || ok && name != f.Dst.Host ||
					!ok && f.Local.String() != f.Dst.HostPort() {
					t.Errorf("a session to %v has the client send to %v", f.Dst, f.Local)
				}
			}
			slices.Sort(dsts)
			if want := []string{"192.0.2.1:9", "a.example:443", "b.example:443"}; !slices.Equal(dsts, want) {
				t.Errorf("sessions to %v, want %v", dsts, want)
			}
		})
	}
}

func TestDatagramToForgottenAddressIsRefused(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: new(proxytest.RecordingHandler)}
	for _, first := range []string{"198.18.9.9:443", "192.0.2.1:9", "10.0.0.53:53"} {
		c := newClient()
		end := serve(t, h, c, first)
		c.send(first, nil)
		c.send("198.18.9.9:443", nil)
		proxytest.Until(t, "the refusal", func() bool {
			return errors.Is(c.refusal(endpoint("198.18.9.9:443")), syscall.EHOSTUNREACH)
		})
		end()
	}
}

func TestRefusalsComeFromTheFakeAddress(t *testing.T) {
	next := &proxytest.RecordingHandler{Err: syscall.ECONNREFUSED}
	h := &Handler{names: names{fixed: true}, Next: next}
	to := fakeOf(t, h, "a.example").String() + ":443"
	c := newClient()
	defer serve(t, h, c, to)()
	c.send(to, nil)
	proxytest.Until(t, "the refusal", func() bool { return errors.Is(c.refusal(endpoint(to)), syscall.ECONNREFUSED) })
}

// packets is a way out for datagrams that echoes each as from where it went.
type packets struct{ proxytest.ScriptedDialer }

func (d *packets) DialPackets(context.Context, proxy.Addr) (relay.PacketConn, error) {
	return newEcho(), nil
}

type echo struct{ *client }

func newEcho() *echo { return &echo{newClient()} }

func (e *echo) WritePacket(p *relay.Packet) error {
	e.in <- datagram{p.Endpoint, bytes.Clone(p.Data)}
	return nil
}

func TestSessionsEndInTime(t *testing.T) {
	query := mustPack(t, newQuestion("b.example.", dns.TypeA))
	for _, tt := range []struct {
		name  string
		to    []string // a datagram each
		lasts time.Duration
	}{
		{"questions only", []string{"10.0.0.53:53", "10.0.0.53:53"}, questionIdle},
		{"a name only", []string{"198.18.0.16:443"}, relay.DefaultPacketIdle},
		{"a name after a question", []string{"10.0.0.53:53", "198.18.0.16:443"}, relay.DefaultPacketIdle},
		{"a question after a name", []string{"198.18.0.16:443", "10.0.0.53:53"}, relay.DefaultPacketIdle},
		{"two names", []string{"198.18.0.16:443", "198.18.0.17:443"}, relay.DefaultPacketIdle},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &Handler{names: names{fixed: true}, Next: &proxy.Engine{Router: proxy.Static{Dialer: new(packets)}}}
				h.begin()
				for _, name := range []string{"a.example", "b.example"} {
					if _, err := h.names.number(name, netip.AddrPort{}); err != nil {
						t.Fatal(err)
					}
				}
				c := newClient()
				start := time.Now()
				for _, to := range tt.to {
					c.send(to, query)
				}
				h.HandlePackets(t.Context(), flowTo(tt.to[0]), c) // returns by itself
				if took := time.Since(start); took != tt.lasts {
					t.Errorf("it took %v, want %v", took, tt.lasts)
				}
				if len(c.out) != len(tt.to) {
					t.Errorf("%d answers to %d datagrams", len(c.out), len(tt.to))
				}
				if err := c.ReadPacket(new(relay.Packet)); !errors.Is(err, net.ErrClosed) {
					t.Errorf("the client's conn: %v", err)
				}
			})
		})
	}
}

func TestContextEndsSessions(t *testing.T) {
	for _, to := range []string{"10.0.0.53:53", "192.0.2.1:9", "198.18.0.16:443"} {
		synctest.Test(t, func(t *testing.T) {
			h := &Handler{names: names{fixed: true}, Next: &proxy.Engine{Router: proxy.Static{Dialer: new(packets)}}}
			h.begin()
			h.names.number("a.example", netip.AddrPort{})
			ctx, cancel := context.WithCancel(t.Context())
			c := newClient()
			c.send(to, mustPack(t, newQuestion("b.example.", dns.TypeA)))
			time.AfterFunc(time.Second, cancel)
			start := time.Now()
			h.HandlePackets(ctx, flowTo(to), c)
			if took := time.Since(start); took != time.Second {
				t.Errorf("%s: it took %v", to, took)
			}
		})
	}
}

func TestAbortEndsQuestionsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &Handler{names: names{fixed: true}, Next: &proxy.Engine{Router: proxy.Static{Dialer: new(packets)}}}
		h.begin()
		h.names.number("a.example", netip.AddrPort{})
		query := mustPack(t, newQuestion("b.example.", dns.TypeA))
		asks, sends, both := newClient(), newClient(), newClient()
		var all sync.WaitGroup
		ended := make(chan string, 3)
		for name, c := range map[string]*client{"asks": asks, "sends": sends, "both": both} {
			first := "198.18.0.16:443"
			if name == "asks" {
				first = "10.0.0.53:53"
			}
			c.send(first, query)
			all.Go(func() { h.HandlePackets(t.Context(), flowTo(first), c); ended <- name })
		}
		both.send("10.0.0.53:53", query)
		synctest.Wait()
		h.Abort()
		synctest.Wait()
		if len(ended) != 1 || <-ended != "asks" {
			t.Errorf("%d sessions ended", len(ended)+1)
		}
		both.send("10.0.0.53:53", query)
		both.send("198.18.0.16:443", query)
		synctest.Wait()
		if n := len(both.out); n != 3 {
			t.Errorf("%d datagrams came, want two before the end and the name's after it", n)
		}
		late := newClient()
		late.send("198.18.0.16:443", query)
		all.Go(func() { h.HandlePackets(t.Context(), flowTo("198.18.0.16:443"), late) })
		synctest.Wait()
		if len(late.out) != 1 {
			t.Error("a session that came later was not carried")
		}
		for _, c := range []*client{sends, both, late} {
			c.Close()
		}
		all.Wait()
	})
}

func TestSlowLaneHoldsUpNoOther(t *testing.T) {
	stuck := make(chan struct{})
	next := handlerFunc(func(f proxy.Flow, c relay.PacketConn) {
		if f.Dst.Host == "slow.example" {
			<-stuck
		}
		new(proxytest.RecordingHandler).HandlePackets(t.Context(), f, c)
	})
	h := &Handler{names: names{fixed: true}, Next: next}
	slow, fast := fakeOf(t, h, "slow.example").String()+":9", fakeOf(t, h, "fast.example").String()+":9"
	c := newClient()
	end := serve(t, h, c, fast)
	c.send(fast, nil)
	c.next(t)
	for range 2 * laneQueue {
		c.send(slow, nil)
	}
	c.send(fast, []byte("x"))
	if got := c.next(t); got.Endpoint != endpoint(fast) {
		t.Errorf("got one from %v", got.Endpoint)
	}
	close(stuck)
	for range laneQueue {
		if got := c.next(t); got.Endpoint != endpoint(slow) {
			t.Errorf("got one from %v", got.Endpoint)
		}
	}
	end()
}

func TestTooManyLanesAreRefused(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: new(proxytest.RecordingHandler)}
	h.begin()
	for i := range lanesMax + 1 {
		h.names.number(fmt.Sprintf("h%d.example", i), netip.AddrPort{})
	}
	c := newClient()
	defer serve(t, h, c, "198.18.0.16:9")()
	for i := range lanesMax + 1 {
		c.send(fakeIP4(i).String()+":9", nil)
	}
	for range lanesMax {
		c.next(t)
	}
	proxytest.Until(t, "the refusal", func() bool { return c.refusal(endpoint(fakeIP4(lanesMax).String()+":9")) != nil })
}

// One session or a few cannot take the lanes of all, and a session always has its first.
func TestLanesOfAllSessionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &Handler{names: names{fixed: true}, Next: new(proxytest.RecordingHandler)}
		h.begin()
		for i := range lanesMax {
			h.names.number(fmt.Sprintf("h%d.example", i), netip.AddrPort{})
		}
		const sessions = 2 * lanesAll / lanesMax
		lanes := int64(0)
		var ends []func()
		for i := range sessions {
			c := newClient()
			ends = append(ends, serve(t, h, c, "10.0.0.53:53"))
			for i := range lanesMax {
				c.send(fakeIP4(i).String()+":9", nil)
			}
			synctest.Wait()
			got := len(c.out)
			if lanes += int64(got - 1); got < 1 || i < 8 && got != lanesMax || h.lanes.Load() != lanes || lanes >= lanesAll {
				t.Fatalf("session %d has %d lanes, and all %d", i, got, h.lanes.Load())
			}
			if got < lanesMax && c.refusal(endpoint(fakeIP4(lanesMax-1).String()+":9")) == nil {
				t.Errorf("session %d has %d lanes, and nothing was refused", i, got)
			}
		}
		if lanes < lanesAll-lanesMax {
			t.Errorf("only %d lanes: too few for the test", lanes)
		}
		for _, end := range ends {
			end()
		}
		if n := h.lanes.Load(); n != 0 {
			t.Errorf("%d lanes after the end", n)
		}
	})
}

type handlerFunc func(proxy.Flow, relay.PacketConn)

func (handlerFunc) HandleStream(context.Context, proxy.Flow, proxy.Pending)             {}
func (h handlerFunc) HandlePackets(_ context.Context, f proxy.Flow, c relay.PacketConn) { h(f, c) }

func TestPanicInOneLaneEndsNoOther(t *testing.T) {
	next := handlerFunc(func(f proxy.Flow, c relay.PacketConn) {
		if f.Dst.Host == "bad.example" {
			panic("broken")
		}
		new(proxytest.RecordingHandler).HandlePackets(t.Context(), f, c)
	})
	h := &Handler{names: names{fixed: true}, Next: next}
	good, bad := fakeOf(t, h, "good.example").String()+":9", fakeOf(t, h, "bad.example").String()+":9"
	c := newClient()
	end := serve(t, h, c, good)
	for range 3 {
		c.send(good, nil)
		c.send(bad, nil)
		if got := c.next(t); got.Endpoint != endpoint(good) {
			t.Errorf("got one from %v", got.Endpoint)
		}
	}
	end()
	if e := h.names.byName["bad.example"]; e.holds != 0 {
		t.Errorf("the name is held %d times after the end", e.holds)
	}
}
