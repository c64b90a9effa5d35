package inbound

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// dialUDP returns a client's socket.
func dialUDP(t testing.TB, a net.Addr) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", a.String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// ask sends one datagram and returns the next that comes.
func ask(t testing.TB, c *net.UDPConn, question []byte) []byte {
	t.Helper()
	if _, err := c.Write(question); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func udpForward(listen, to string) *Forward {
	l, _ := proxy.ParseListen("udp://" + listen)
	d, _ := proxy.ParseDst("udp://" + to)
	return &Forward{Listener: Listener{Name: "in", Addr: l}, To: d}
}

func TestForwardDatagrams(t *testing.T) {
	h := &proxytest.RecordingHandler{}
	a := startInbound(t, udpForward("127.0.0.1:0", "192.0.2.1:53"), h)
	first, second := dialUDP(t, a), dialUDP(t, a)
	largest := bytes.Repeat([]byte("0123456789"), 6550)
	largest = append(largest, "0123456"...) // 65 507 bytes: no IPv4 datagram holds more
	for _, c := range []*net.UDPConn{first, second, first} {
		for _, q := range [][]byte{[]byte("question"), {}, largest} {
			if got := ask(t, c, q); !bytes.Equal(got, q) {
				t.Errorf("asked %d bytes, answered %d", len(q), len(got))
			}
		}
	}
	flows := h.Flows()
	if len(flows) != 2 {
		t.Fatalf("sessions: %+v", flows)
	}
	for i, c := range []*net.UDPConn{first, second} {
		want := proxy.Flow{Inbound: "in", Client: c.LocalAddr().(*net.UDPAddr).AddrPort(),
			Local: a.(*net.UDPAddr).AddrPort(), Dst: proxy.UDP("192.0.2.1", 53)}
		if flows[i] != want {
			t.Errorf("flow %+v, want %+v", flows[i], want)
		}
	}
}

// A client takes an answer only from the address that it has asked.
func TestForwardAnswersFromTheAddressThatWasAsked(t *testing.T) {
	for _, listen := range []string{":0", "0.0.0.0:0"} {
		t.Run(listen, func(t *testing.T) {
			h := &proxytest.RecordingHandler{}
			a := startInbound(t, udpForward(listen, "192.0.2.1:1000"), h)
			port := a.(*net.UDPAddr).Port
			asked := []string{fmt.Sprintf("127.0.0.1:%d", port), fmt.Sprintf("127.0.0.9:%d", port)}
			if listen == ":0" {
				asked = append(asked, fmt.Sprintf("[::1]:%d", port))
			}
			for i, s := range asked {
				at := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s))
				if got := ask(t, dialUDP(t, at), []byte(s)); string(got) != s {
					t.Errorf("%s answered %q", s, got)
				}
				if f := h.Flows()[i]; f.Local.String() != s {
					t.Errorf("asked %s, and it is said to be %v", s, f.Local)
				}
			}
		})
	}
}

func TestForwardRefusesWhatCannotBe(t *testing.T) {
	for name, f := range map[string]*Forward{
		"streams to datagrams": {Listener: Listener{Addr: loopback}, To: proxy.UDP("192.0.2.1", 53)},
		"datagrams to streams": {Listener: Listener{Addr: proxy.UDP("127.0.0.1", 0)}, To: proxy.TCP("192.0.2.1", 53)},
		"PROXY header":         {Listener: Listener{Addr: proxy.UDP("127.0.0.1", 0)}, To: proxy.UDP("192.0.2.1", 53), SendProxy: 2},
	} {
		if err := f.Listen(t.Context()); err == nil {
			t.Errorf("%s: no error", name)
			f.Close()
		}
	}
	s := &SOCKS5{Listener: Listener{Addr: proxy.UDP("127.0.0.1", 0)}}
	if err := s.Listen(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a SOCKS5 inbound at a UDP address: %v", err)
	}
}

func TestForwardNamesWhoHasThePort(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = udpForward(c.LocalAddr().String(), "192.0.2.1:53").Listen(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "in use by") {
		t.Errorf("got %v", err)
	}
}

// What comes from elsewhere than the destination is not the destination's answer.
func TestForwardDropsDatagramsOfStrangers(t *testing.T) {
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		var p relay.Packet
		defer p.Free()
		if c.ReadPacket(&p) != nil {
			return
		}
		asked := p.Endpoint
		for _, e := range []relay.Endpoint{
			{IP: netip.MustParseAddr("198.51.100.1"), Port: asked.Port}, {IP: asked.IP, Port: asked.Port + 1},
		} {
			p.Endpoint = e
			if c.WritePacket(&p) == nil {
				t.Errorf("passed on what came from %v", e)
			}
		}
		p.Endpoint = asked
		copy(p.Data, "true")
		c.WritePacket(&p)
	})
	a := startInbound(t, udpForward("127.0.0.1:0", "192.0.2.1:1000"), h)
	if got := ask(t, dialUDP(t, a), []byte("what")); string(got) != "true" {
		t.Errorf("got %q", got)
	}
}

// packetHandler is a proxy.Handler of datagrams only.
type packetHandler func(ctx context.Context, c relay.PacketConn)

func (h packetHandler) HandleStream(context.Context, proxy.Flow, proxy.Pending) {}
func (h packetHandler) HandlePackets(ctx context.Context, _ proxy.Flow, c relay.PacketConn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	h(ctx, c)
}

// A session that does not read holds nobody up, and its own datagrams are dropped once its queue is full.
func TestSlowSessionDoesNotBlockOthers(t *testing.T) {
	var first atomic.Bool
	slow, dropped, release := make(chan relay.PacketConn, 1), make(chan int64, 1), make(chan struct{})
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		if !first.Swap(true) {
			slow <- c
			<-release
			dropped <- c.(relay.Dropper).Dropped()
			return
		}
		echoPackets(c)
	})
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	a := startInbound(t, f, h)
	c := dialUDP(t, a)
	c.Write([]byte("x"))
	session := (<-slow).(*datagramSession)
	const more = 100
	proxytest.Until(t, "a full queue", func() bool {
		c.Write([]byte("x"))
		return session.Dropped() >= more
	})
	if got := ask(t, dialUDP(t, a), []byte("hello")); string(got) != "hello" {
		t.Errorf("got %q", got)
	}
	held := f.packets.held.Load()
	if max := int64(queueMemory); held > max || held != queueDatagrams*relay.PacketMemory(1) {
		t.Errorf("the queue holds %d bytes", held)
	}
	close(release)
	if n := <-dropped; n < more {
		t.Errorf("counted %d dropped", n)
	}
	proxytest.Until(t, "an empty queue", func() bool { return f.packets.held.Load() == 0 })
}

func TestQueueIsBoundedInBytes(t *testing.T) {
	var q datagramQueue
	var held atomic.Int64
	big, n := make([]byte, 60_000), 0
	for q.push(relay.Endpoint{}, big, &held) {
		n++
	}
	if n != queueMemory/(64<<10) || n*len(big) < 3<<20 || held.Load() != queueMemory {
		t.Errorf("%d datagrams, %d bytes", n, held.Load())
	}
	held.Store(allQueues)
	q.clear(&held)
	if held.Load() != allQueues-queueMemory || q.Len() != 0 {
		t.Errorf("%d bytes are left", held.Load())
	}
	held.Store(allQueues)
	if q.push(relay.Endpoint{}, nil, &held) {
		t.Error("more than all queues may hold")
	}
}

// TestQueueTakesAPause: who is not scheduled for a while loses nothing of a fast sender.
func TestQueueTakesAPause(t *testing.T) {
	var q datagramQueue
	var held atomic.Int64
	const datagrams = 500e6 / 8 * 40 / 1000 / 1400 // of 40 ms
	data := make([]byte, 1400)
	for i := range int(math.Round(datagrams)) {
		if !q.push(relay.Endpoint{}, data, &held) {
			t.Fatalf("dropped datagram %d", i)
		}
	}
	q.clear(&held)
}

// TestForgedSourcesTakeBoundedMemory: any number of sessions that nobody reads hold no more than there is for all, and a few leave room
// for one that is read.
func TestForgedSourcesTakeBoundedMemory(t *testing.T) {
	var held atomic.Int64
	queues := make([]datagramQueue, 1000)
	for _, size := range []int{1, 60_000} {
		data := make([]byte, size)
		for i := range queues {
			for queues[i].push(relay.Endpoint{}, data, &held) {
			}
			if held.Load() > allQueues {
				t.Fatalf("%d queues hold %d bytes", i+1, held.Load())
			}
			var read datagramQueue
			if i == 16 && !read.push(relay.Endpoint{}, []byte("hello"), &held) {
				t.Errorf("%d queues leave no room for another", i+1)
			}
			read.clear(&held)
		}
		for i := range queues {
			queues[i].clear(&held)
		}
		if held.Load() != 0 {
			t.Fatalf("%d bytes are left", held.Load())
		}
	}
}

// TestQueueThatIsClosedCountsAsDropped: what a session has not read when it ends is lost.
func TestQueueThatIsClosedCountsAsDropped(t *testing.T) {
	began, release := make(chan relay.PacketConn, 1), make(chan struct{})
	h := packetHandler(func(_ context.Context, c relay.PacketConn) { began <- c; <-release })
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	c := dialUDP(t, startInbound(t, f, h))
	const sent = 5
	for range sent {
		c.Write([]byte("x"))
	}
	s := (<-began).(*datagramSession)
	proxytest.Until(t, "all are in the queue", func() bool {
		return f.packets.held.Load() == sent*relay.PacketMemory(1)
	})
	s.Close()
	close(release)
	if n := s.Dropped(); n != sent {
		t.Errorf("%d dropped, want %d", n, sent)
	}
}

// The queue keeps its order while it is filled and emptied.
func TestQueueKeepsOrder(t *testing.T) {
	var q datagramQueue
	var held atomic.Int64
	in, out := 0, 0
	for step := range 5000 {
		for range step % 7 {
			if q.push(relay.Endpoint{Port: uint16(in)}, nil, &held) {
				in++
			}
		}
		for range step % 6 {
			if q.Len() == 0 {
				break
			}
			if p := q.pop(&held); p.Endpoint.Port != uint16(out) {
				t.Fatalf("got %d, want %d", p.Endpoint.Port, uint16(out))
			} else {
				p.Free()
			}
			out++
		}
	}
	if in < 10_000 || q.Len() > queueDatagrams {
		t.Errorf("%d in, %d wait", in, q.Len())
	}
	q.clear(&held)
}

func echoPackets(c relay.PacketConn) {
	var p relay.Packet
	defer p.Free()
	for c.ReadPacket(&p) == nil {
		c.WritePacket(&p)
	}
}

// At the limit, clients that were answered keep their sessions; one that never was makes room after a while.
func TestSessionLimit(t *testing.T) {
	var log logBuffer
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		var p relay.Packet
		defer p.Free()
		for c.ReadPacket(&p) == nil {
			if string(p.Data) != "silence" {
				c.WritePacket(&p)
			}
			p.Free()
		}
	})
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	f.MaxConns, f.Log = 2, log.logger()
	a := startInbound(t, f, h)
	good, silent, third := dialUDP(t, a), dialUDP(t, a), dialUDP(t, a)
	ask(t, good, []byte("hello"))
	silent.Write([]byte("silence"))
	begin := time.Now()
	proxytest.Until(t, "a place for the third", func() bool {
		third.Write([]byte("me too"))
		third.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err := third.Read(make([]byte, 10))
		return err == nil
	})
	if took := time.Since(begin); took < answerWait/2 {
		t.Errorf("made room after %v", took)
	}
	if got := ask(t, good, []byte("still")); string(got) != "still" {
		t.Errorf("got %q", got)
	}
	if log.count("as many sessions as there may be") != 1 || f.packets.refused.Load() == 0 {
		t.Errorf("%d refused, log %s", f.packets.refused.Load(), log.b.String())
	}
}

func TestForwardDatagramsAllow(t *testing.T) {
	var log logBuffer
	h := &proxytest.RecordingHandler{}
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	f.Deny, f.Log = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, log.logger()
	c := dialUDP(t, startInbound(t, f, h))
	for range 10 {
		c.Write([]byte("hello"))
	}
	proxytest.Until(t, "all are refused", func() bool { return f.packets.refused.Load() == 10 })
	if len(h.Flows()) > 0 || log.count("refused by allow/deny") != 1 {
		t.Errorf("flows %v, log %s", h.Flows(), log.b.String())
	}
}

// Close takes no new clients, and lets an answer that is under way arrive.
func TestForwardDatagramsDrain(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		var p relay.Packet
		defer p.Free()
		c.ReadPacket(&p)
		close(asked)
		<-answer
		c.WritePacket(&p)
		p.Free()
		c.ReadPacket(&p) // until it is closed
	})
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	a := startInbound(t, f, h)
	c := dialUDP(t, a)
	c.Write([]byte("hello"))
	<-asked
	f.Close()
	dialUDP(t, a).Write([]byte("too late")) // would close asked again
	time.AfterFunc(quietTime/2, func() { close(answer) })
	b := make([]byte, 10)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("got %q, %v", b[:n], err)
	}
}

// A panic costs its own session only.
func TestForwardDatagramsPanic(t *testing.T) {
	var log logBuffer
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		var p relay.Packet
		defer p.Free()
		for c.ReadPacket(&p) == nil {
			if string(p.Data) == "panic" {
				panic("as asked")
			}
			c.WritePacket(&p)
		}
	})
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	f.Log = log.logger()
	a := startInbound(t, f, h)
	dialUDP(t, a).Write([]byte("panic"))
	proxytest.Until(t, "the panic", func() bool { return log.count("as asked") > 0 })
	ask(t, dialUDP(t, a), []byte("hello"))
}

// The client of a forward hears what a host without a listener would have told it.
func TestForwardTellsByICMP(t *testing.T) {
	proxytest.NeedRoot(t)
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		h := &proxytest.RecordingHandler{Err: syscall.ECONNREFUSED}
		c := dialUDP(t, startInbound(t, udpForward(listen, "192.0.2.1:1000"), h))
		c.Write([]byte("hello"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: client heard %v", listen, err)
		}
	}
}

// Thousands of clients cost memory in proportion, and give it back.
func TestManyDatagramSessions(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a second")
	}
	const clients = 10_000
	h := packetHandler(func(_ context.Context, c relay.PacketConn) { echoPackets(c) })
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	a := startInbound(t, f, h).(*net.UDPAddr).AddrPort()
	before := heapInUse()
	b := make([]byte, 16)
	for i := range clients { // each from an address of its own
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 1, byte(i>>8), byte(i))}, net.UDPAddrFromAddrPort(a))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		c.Write([]byte("hello"))
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if n := f.packets.sessionCount(); n != clients {
		t.Errorf("%d sessions", n)
	}
	if each := (heapInUse() - before) / clients; each > 16<<10 {
		t.Errorf("a session costs %d bytes", each)
	} else {
		t.Logf("a session costs %d bytes here, and what its handler does", each)
	}
}

func (d *demux) sessionCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.sessions)
}

// heapInUse returns the bytes of heap and stacks that are in use.
func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// Datagrams that come in bursts are passed on in batches, and arrive each as it was, in their order, both ways.
func TestForwardDatagramsInBursts(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "0.0.0.0:0"} {
		echo := proxytest.EchoPackets(t, "127.0.0.1")
		engine := &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: new(outbound.Direct)}}
		a := startInbound(t, udpForward(listen, echo.HostPort()), engine).(*net.UDPAddr)
		c := dialUDP(t, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.Port})
		got := make([]byte, 1<<16)
		for round := range 20 {
			var sent [][]byte
			for i := range 40 {
				data := bytes.Repeat([]byte{byte(i)}, 1+(i/8)*300) // some of one size, and then others
				sent = append(sent, data)
				c.Write(data)
			}
			for i, want := range sent {
				if n, err := c.Read(got); err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("%s: round %d, datagram %d of %d bytes: got %d, %v", listen, round, i, len(want), n, err)
				}
			}
		}
	}
}

// What the kernel had no room for is told.
func TestLostDatagramsAreLogged(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the system does not tell what it has dropped")
	}
	proxytest.NoLeaks(t)
	var log logBuffer
	f := udpForward("127.0.0.1:0", "192.0.2.1:1000")
	f.Log = log.logger()
	ctx, cancel := context.WithCancel(t.Context())
	if err := f.Listen(ctx); err != nil {
		t.Fatal(err)
	}
	f.packets.conn.SetReadBuffer(1)
	c := dialUDP(t, f.BoundAddr())
	for range 1000 {
		c.Write(make([]byte, 1000))
	}
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx, &proxytest.RecordingHandler{}) }()
	proxytest.Until(t, "what was lost is logged", func() bool { return log.count("datagrams lost") == 1 })
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
