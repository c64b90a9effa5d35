package inbound

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// TestWaysWithoutDatagramsAreToldAtOnce: the client of a way out that carries no datagrams hears so, and does not wait for an answer.
func TestWaysWithoutDatagramsAreToldAtOnce(t *testing.T) {
	proxytest.NeedRoot(t)
	streams := new(proxytest.ScriptedDialer)
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		engine := &proxy.Engine{Router: proxy.Static{Name: "streams", Dialer: streams}}
		c := dialUDP(t, startInbound(t, udpForward(listen, "192.0.2.1:1000"), engine))
		c.SetDeadline(time.Now().Add(2 * time.Second))
		c.Write([]byte("hello"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: client heard %v", listen, err)
		}
	}
}

// refuseCounter counts what a session is told to refuse.
type refuseCounter struct{ n int }

func (r *refuseCounter) WritePacket(*relay.Packet) error { return nil }
func (r *refuseCounter) Close() error                    { return nil }
func (r *refuseCounter) Refuse(relay.Endpoint, error)    { r.n++ }

// TestForgedSourcesAreNotFloodedWithErrors: only so many ICMP errors a second are sent, however many datagrams there are.
func TestForgedSourcesAreNotFloodedWithErrors(t *testing.T) {
	d := newDemux(&Listener{}, nil)
	r := new(refuseCounter)
	begin := time.Now()
	for range 10_000 {
		s := &datagramSession{demux: d, answerer: r}
		s.Refuse(relay.Endpoint{}, syscall.ECONNREFUSED)
	}
	if most := icmpBurst + int(icmpRate*time.Since(begin).Seconds()) + 1; r.n > most || r.n < icmpBurst {
		t.Errorf("%d errors were sent, at most %d are allowed", r.n, most)
	}
}

// TestErrorsReachTheLinkLocal: an ICMP error to a client on the link goes out at the client's interface.
func TestErrorsReachTheLinkLocal(t *testing.T) {
	sa, ok := sockaddr(netip.MustParseAddr("fe80::1%7")).(*unix.SockaddrInet6)
	if !ok || sa.ZoneId != 7 {
		t.Errorf("%+v", sa)
	}
}
