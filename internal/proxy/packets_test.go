package proxy_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// packetEnd is a PacketConn that yields what is put into it.
type packetEnd struct {
	in     chan string
	out    chan string
	once   sync.Once
	closed chan struct{}

	mu      sync.Mutex
	refused []error
}

func newPacketEnd() *packetEnd {
	return &packetEnd{in: make(chan string), out: make(chan string, 10), closed: make(chan struct{})}
}

var nowhere = relay.Endpoint{Name: "nowhere.test", Port: 7}

func (c *packetEnd) ReadPacket(p *relay.Packet) error {
	select {
	case s := <-c.in:
		*p = relay.Packet{Endpoint: nowhere, Data: []byte(s)}
		return nil
	case <-c.closed:
		return net.ErrClosed
	}
}

func (c *packetEnd) WritePacket(p *relay.Packet) error { c.out <- string(p.Data); return nil }

func (c *packetEnd) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *packetEnd) Refuse(_ relay.Endpoint, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = append(c.refused, err)
}

// packetWay is a PacketDialer.
type packetWay struct {
	proxy.Dialer
	dial func(ctx context.Context) (relay.PacketConn, error)
}

func (w packetWay) DialPackets(ctx context.Context, _ proxy.Addr) (relay.PacketConn, error) {
	return w.dial(ctx)
}

// handlePackets runs a session and returns its client's end and what is closed when it is over.
func handlePackets(ctx context.Context, e *proxy.Engine) (client *packetEnd, over <-chan struct{}) {
	client = newPacketEnd()
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.HandlePackets(ctx, proxy.Flow{Inbound: "in", Dst: proxy.UDP("nowhere.test", 7)}, client)
	}()
	return client, done
}

func TestPacketsAreRelayedUntilTheirEnd(t *testing.T) {
	for name, end := range map[string]func(e *proxy.Engine, cancel context.CancelFunc, client *packetEnd){
		"client closes": func(_ *proxy.Engine, _ context.CancelFunc, c *packetEnd) { c.Close() },
		"cancelled":     func(_ *proxy.Engine, cancel context.CancelFunc, _ *packetEnd) { cancel() },
		"aborted":       func(e *proxy.Engine, _ context.CancelFunc, _ *packetEnd) { e.Abort() },
		"silent":        func(*proxy.Engine, context.CancelFunc, *packetEnd) {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				origin, log := newPacketEnd(), new(lockedLog)
				e := &proxy.Engine{Log: slog.New(slog.NewTextHandler(log, nil)), Router: proxy.Static{Name: "way", Dialer: packetWay{
					dial: func(context.Context) (relay.PacketConn, error) { return origin, nil }}}}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				client, over := handlePackets(ctx, e)
				client.in <- "question"
				if s := <-origin.out; s != "question" {
					t.Error("origin got", s)
				}
				origin.in <- "answer"
				if s := <-client.out; s != "answer" {
					t.Error("client got", s)
				}
				if n := e.Sessions(); n != 1 {
					t.Error(n, "sessions")
				}
				end(e, cancel, client)
				<-over
				<-origin.closed
				<-client.closed
				if n := e.Sessions(); n != 0 {
					t.Error(n, "sessions left")
				}
				if s := log.String(); !containsAll(s, "dst=udp://nowhere.test:7", "via=way", "up=8", "down=6") {
					t.Error(s)
				}
			})
		})
	}
}

// addressed is a client's end whose datagrams go to the host that they name.
type addressed struct{ *packetEnd }

func (c addressed) ReadPacket(p *relay.Packet) error {
	err := c.packetEnd.ReadPacket(p)
	p.Endpoint.Name = string(p.Data)
	return err
}

// secretRule denies one host.
type secretRule struct{ way proxy.Dialer }

type denier struct{ proxy.Dialer }

func (denier) Denied(proxy.Addr) error { return proxy.ErrDenied }

func (r secretRule) Route(f proxy.Flow) (string, proxy.Dialer) {
	if f.Dst.Host == "secret.test" && f.User == "me" {
		return "reject", denier{}
	}
	return "way", r.way
}

// TestLaterPacketsAreDenied checks that a client does not get where the rules deny it by having been somewhere else before.
func TestLaterPacketsAreDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, client := newPacketEnd(), newPacketEnd()
		e := &proxy.Engine{Router: secretRule{packetWay{dial: func(context.Context) (relay.PacketConn, error) { return origin, nil }}}}
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.HandlePackets(t.Context(), proxy.Flow{User: "me", Dst: proxy.UDP("nowhere.test", 7)}, addressed{client})
		}()
		for _, host := range []string{"nowhere.test", "secret.test", "elsewhere.test", "secret.test"} {
			client.in <- host
		}
		synctest.Wait()
		client.Close()
		<-done
		close(origin.out)
		var got []string
		for s := range origin.out {
			got = append(got, s)
		}
		if s := strings.Join(got, " "); s != "nowhere.test elsewhere.test" {
			t.Errorf("what came out: %s", s)
		}
		if len(client.refused) != 2 || !errors.Is(client.refused[0], proxy.ErrDenied) {
			t.Errorf("the client was told %v", client.refused)
		}
	})
}

// byHost sends each host its own way.
type byHost map[string]proxy.Dialer

func (r byHost) Route(f proxy.Flow) (string, proxy.Dialer) {
	host, _, _ := strings.Cut(f.Dst.Host, "/")
	return "to " + host, r[host]
}

// TestEachPacketGoesItsWay checks that the way of a session's first datagram is not that of all.
func TestEachPacketGoesItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lan, wan, client := newPacketEnd(), newPacketEnd(), newPacketEnd()
		dials := make(map[string]int)
		opens := func(name string, c relay.PacketConn, err error) proxy.Dialer {
			return packetWay{dial: func(context.Context) (relay.PacketConn, error) { dials[name]++; return c, err }}
		}
		hangs := packetWay{dial: func(ctx context.Context) (relay.PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		log := new(lockedLog)
		e := &proxy.Engine{Log: slog.New(slog.NewTextHandler(log, nil)), Router: byHost{
			"lan": opens("lan", lan, nil), "wan": opens("wan", wan, nil), "down": opens("down", nil, syscall.ECONNREFUSED),
			"streams only": struct{ proxy.Dialer }{}, "silent": hangs}}
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.HandlePackets(t.Context(), proxy.Flow{Dst: proxy.UDP("lan", 7)}, addressed{client})
		}()
		for _, host := range []string{"lan", "wan", "down", "streams only", "lan", "wan", "down/2"} {
			client.in <- host
		}
		synctest.Wait()
		lan.in <- "from lan"
		synctest.Wait()
		wan.in <- "from wan"
		synctest.Wait()
		for _, end := range []struct {
			*packetEnd
			want string
		}{{lan, "lan lan"}, {wan, "wan wan"}, {client, "from lan from wan"}} {
			var got []string
			for range len(end.out) {
				got = append(got, <-end.out)
			}
			if s := strings.Join(got, " "); s != end.want {
				t.Errorf("got %q, want %q", s, end.want)
			}
		}
		if dials["lan"] != 1 || dials["wan"] != 1 || dials["down"] != 1 {
			t.Errorf("dialled %v", dials)
		}
		if r := client.refused; len(r) != 3 || !errors.Is(r[0], syscall.ECONNREFUSED) || !errors.Is(r[1], errors.ErrUnsupported) || r[2] != r[0] {
			t.Errorf("the client was told %v", r)
		}
		time.Sleep(10 * time.Second)
		client.in <- "down" // once more
		client.in <- "silent"
		synctest.Wait()
		if dials["down"] != 2 {
			t.Errorf("dialled %v", dials)
		}
		client.Close() // while a way is being opened
		<-done
		<-lan.closed
		<-wan.closed
		if s := log.String(); !containsAll(s, "up=12", "down=16", "dropped=5") {
			t.Error(s)
		}
	})
}

// TestPacketsWithoutAWay: the client is told, and the log says why.
func TestPacketsWithoutAWay(t *testing.T) {
	for _, tt := range []struct {
		name   string
		dialer proxy.Dialer
		want   error
	}{
		{"streams only", struct{ proxy.Dialer }{}, errors.ErrUnsupported},
		{"refused", packetWay{dial: func(context.Context) (relay.PacketConn, error) { return nil, syscall.ECONNREFUSED }}, syscall.ECONNREFUSED},
		{"late", packetWay{dial: func(ctx context.Context) (relay.PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}, context.DeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := &proxy.Engine{Router: proxy.Static{Dialer: tt.dialer}}
				client, over := handlePackets(t.Context(), e)
				<-over
				<-client.closed
				if len(client.refused) != 1 || !errors.Is(client.refused[0], tt.want) {
					t.Errorf("client was told %v, want %v", client.refused, tt.want)
				}
			})
		})
	}
}

func TestEndSilentLeavesThoseThatAreNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &proxy.Engine{Router: proxy.Static{Dialer: packetWay{
			dial: func(context.Context) (relay.PacketConn, error) { return newPacketEnd(), nil }}}}
		silent, silentOver := handlePackets(t.Context(), e)
		loud, loudOver := handlePackets(t.Context(), e)
		silent.in <- "x"
		time.Sleep(2 * time.Second)
		loud.in <- "x"
		synctest.Wait()
		e.EndSilent(time.Second)
		<-silentOver
		if n := e.Sessions(); n != 1 {
			t.Error(n, "sessions")
		}
		loud.Close()
		<-loudOver
	})
}

func containsAll(s string, words ...string) bool {
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}
