package conform

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// options suit many runs beside each other, on a machine that has other things to do.
var options = relaytest.Options{
	Delay:   250 * time.Millisecond, // many run at a time, in one process; package relay looks for Nagle
	Bytes:   512 << 10,
	Rounds:  20,
	Silence: 100 * time.Millisecond,
	Prompt:  3 * time.Second,
	Held:    48 << 20,
	Timeout: 40 * time.Second,
}

// mix is a way from a client to an origin.
type mix struct {
	name   string
	in     int    // of protocols
	client string // network
	origin string // network
	via    func(t *testing.T, s setup) (proxy.Dialer, *sluice)
	lacks  relaytest.Caps // what a hop in between cannot carry
	hops   int            // kernel sockets in between, each with a buffer either way
}

// mixes are all inbounds over all transports on either side, and each kind of hop in between.
func mixes() []mix {
	all := []mix{
		{name: "forward", in: forward, client: "tcp", origin: "tcp"},
		{name: "socks5", in: socks5, client: "tcp", origin: "tcp"},
		{name: "connect", in: connect, client: "tcp", origin: "tcp"},
		{name: "mixed-socks5", in: mixedSOCKS5, client: "tcp", origin: "tcp"},
		{name: "mixed-connect", in: mixedConnect, client: "tcp", origin: "tcp"},

		{name: "unix-forward", in: forward, client: "unix", origin: "tcp"},
		{name: "unix-socks5", in: socks5, client: "unix", origin: "tcp"},
		{name: "unix-connect", in: connect, client: "unix", origin: "tcp"},
		{name: "forward-unix", in: forward, client: "tcp", origin: "unix"}, // SOCKS5 and CONNECT have no names for such origins
		{name: "unix-forward-unix", in: forward, client: "unix", origin: "unix"},

		{name: "forward-via-socks5", in: forward, client: "tcp", origin: "tcp", via: viaSOCKS5, hops: 1},
		{name: "socks5-via-http", in: socks5, client: "tcp", origin: "tcp", via: viaHTTP, hops: 1},
		{name: "mixed-connect-via-socks5", in: mixedConnect, client: "tcp", origin: "tcp", via: viaSOCKS5, hops: 1},
	}
	// Urgent data is TCP's alone, and a stream in memory tells of its reset who reads or writes it.
	const tlsLacks, streamLacks = relaytest.Urgent, relaytest.Urgent | relaytest.Watch
	for _, in := range []int{forward, socks5, connect} {
		name := protocols[in].name
		all = append(all,
			mix{name: name + "-via-https", in: in, client: "tcp", origin: "tcp", via: viaHTTPS, lacks: tlsLacks, hops: 2},
			mix{name: name + "-via-stream", in: in, client: "tcp", origin: "tcp", via: viaMemory(relaytest.Stream()), lacks: streamLacks},
			mix{name: name + "-via-pipe", in: in, client: "tcp", origin: "tcp", via: viaMemory(relaytest.Pipe()), lacks: ^relaytest.Caps(0)},
		)
	}
	return all
}

// viaMemory has the engine relay to a conn in memory, as those of SSH and of userspace stacks are. What comes
// out of its other end goes to the origin.
func viaMemory(l relaytest.Leg) func(*testing.T, setup) (proxy.Dialer, *sluice) {
	return func(_ *testing.T, s setup) (proxy.Dialer, *sluice) { return &memoryDialer{s.dialer, l}, nil }
}

type memoryDialer struct {
	next proxy.Dialer
	leg  relaytest.Leg
}

func (d *memoryDialer) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	origin, err := d.next.DialStream(ctx, dst)
	if err != nil {
		return nil, err
	}
	near, far, err := d.leg.Pair(ctx)
	if err != nil {
		origin.Close()
		return nil, err
	}
	// Where the conn cannot half-close, the relays at its two ends do not hear that both client and origin
	// have ended, and this one is to give up sooner than after minutes.
	r := relay.Relay{HalfOpen: 2 * time.Second}
	r.Start(d.leg.Relayed(far), origin, nil, func(relay.Result) {})
	return near, nil
}

// bed starts what m is made of, and an origin.
func (m mix) bed(t *testing.T) *relaytest.Dialed {
	t.Helper()
	listen := "127.0.0.1:0"
	if m.origin == "unix" {
		listen = socketPath(t)
	}
	ln, err := net.Listen(m.origin, listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	s := setup{protocol: protocols[m.in], network: m.client, to: addrOf(ln.Addr()), dialer: &outbound.Direct{}}
	if m.via != nil {
		s.dialer, _ = m.via(t, s)
	}
	d := &sayingDialer{s.dialer, make(chan struct{}, 1000)}
	s.dialer = d
	through := start(t, s)
	return &relaytest.Dialed{
		Origin:     settledListener{ln, d.dialed},
		Connect:    func(ctx context.Context) (net.Conn, error) { return through.dial(ctx, addrOf(ln.Addr())) },
		ClientCaps: caps(m.client, m.lacks),
		OriginCaps: caps(m.origin, m.lacks),
	}
}

// sayingDialer says when it has dialled.
type sayingDialer struct {
	proxy.Dialer
	dialed chan struct{}
}

func (d *sayingDialer) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	c, err := d.Dialer.DialStream(ctx, dst)
	if err == nil {
		d.dialed <- struct{}{}
	}
	return c, err
}

// settledListener accepts a conn only when its dialler, too, knows that it is connected. A client of forward
// hears nothing of that; and a reset in between, from either end, is one of a pending dial, which is no scenario's.
type settledListener struct {
	net.Listener
	dialed <-chan struct{}
}

func (l settledListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		<-l.dialed
	}
	return c, err
}

func (l settledListener) SetDeadline(t time.Time) error {
	return l.Listener.(interface{ SetDeadline(time.Time) error }).SetDeadline(t)
}

func caps(network string, lacks relaytest.Caps) relaytest.Caps {
	leg := relaytest.TCP()
	if network == "unix" {
		leg = relaytest.Unix()
	}
	c := leg.Caps &^ lacks
	if c == 0 {
		c = none // zero is what TCP does
	}
	return c
}

// none is a capability that no scenario asks for.
const none relaytest.Caps = 1 << 31

// Every scenario passes through every mix that can carry it; the log says which those are that it cannot.
func TestScenarios(t *testing.T) {
	proxytest.NoLeaks(t)
	t.Run("mixes", func(t *testing.T) { // NoLeaks looks when all are done
		for _, m := range mixes() {
			t.Run(m.name, func(t *testing.T) {
				t.Parallel()
				o := options
				o.Held += int64(m.hops) * o.Held / 2 // which is for two legs
				relaytest.RunBed(t, m.bed(t), o)
			})
		}
	})
}

// What is idle costs nothing, through each inbound.
func TestCost(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, m := range mixes()[:3] {
		t.Run(m.name, func(t *testing.T) {
			b := m.bed(t)
			b.Meter = relaytest.InProcess()
			o := options
			o.Only = "cpu-"
			relaytest.RunBed(t, b, o)
		})
	}
}

// The bed's dial is what the scenarios rest on: it hands over a conn of which nothing was read.
func TestAnswersEndWhereTheyShould(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) { io.WriteString(c, "220 ready\r\n") })
	for _, p := range protocols {
		s := start(t, setup{protocol: p, to: origin.Addr, dialer: &outbound.Direct{}})
		c, err := s.dial(t.Context(), origin.Addr)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); string(b) != "220 ready\r\n" || err != nil {
			t.Errorf("%s: %q, %v", p.name, b, err)
		}
		c.Close()
	}
}
