package relay

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"
)

func listenUDP(t testing.TB, network, addr string) *UDPConn {
	t.Helper()
	a, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenUDP(network, a)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return NewUDPConn(c)
}

func TestUDPConn(t *testing.T) {
	for _, tt := range []struct{ network, a, b string }{
		{"udp4", "127.0.0.1:0", "127.0.0.1:0"},
		{"udp6", "[::1]:0", "[::1]:0"},
		{"udp", "[::]:0", "127.0.0.1:0"}, // IPv4 over a socket of IPv6
		{"udp", "[::]:0", "[::1]:0"},
	} {
		t.Run(tt.a+" "+tt.b, func(t *testing.T) {
			a, b := listenUDP(t, tt.network, tt.a), listenUDP(t, "udp", tt.b)
			to := b.LocalAddr()
			for _, data := range [][]byte{[]byte("hello"), {}, bytes.Repeat([]byte("x"), 65_507)} {
				p := Packet{Endpoint: EndpointOf(to), Data: data}
				if err := a.WritePacket(&p); err != nil {
					t.Fatal(err)
				}
				var q Packet
				if err := b.ReadPacket(&q); err != nil {
					t.Fatal(err)
				}
				want := Endpoint{IP: to.Addr(), Port: a.LocalAddr().Port()}
				if !bytes.Equal(q.Data, data) || q.Endpoint != want {
					t.Errorf("got %d bytes from %v, want %d from %v", len(q.Data), q.Endpoint, len(data), want)
				}
				if err := b.WritePacket(&q); err != nil { // and back
					t.Fatal(err)
				}
				q.Free()
				if err := a.ReadPacket(&q); err != nil || q.Endpoint != EndpointOf(to) {
					t.Errorf("from %v, %v", q.Endpoint, err)
				}
				q.Free()
			}
		})
	}
}

func TestUDPConnConnected(t *testing.T) {
	origin := listenUDP(t, "udp", "127.0.0.1:0")
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(origin.LocalAddr()))
	if err != nil {
		t.Fatal(err)
	}
	u := NewUDPConn(c)
	defer u.Close()
	p := Packet{Endpoint: Endpoint{Name: "somewhere else", Port: 1}, Data: []byte("hello")}
	if err := u.WritePacket(&p); err != nil {
		t.Fatal(err)
	}
	var q Packet
	if err := origin.ReadPacket(&q); err != nil || string(q.Data) != "hello" {
		t.Fatalf("%q, %v", q.Data, err)
	}
	origin.WritePacket(&q)
	if err := u.ReadPacket(&q); err != nil || q.Endpoint != EndpointOf(origin.LocalAddr()) {
		t.Errorf("from %v, %v", q.Endpoint, err)
	}
}

func TestUDPConnErrorsAreOfTheirDatagram(t *testing.T) {
	c, origin := listenUDP(t, "udp4", "127.0.0.1:0"), listenUDP(t, "udp4", "127.0.0.1:0")
	for _, tt := range []struct {
		name string
		p    Packet
		want error
	}{
		{"too long", Packet{Endpoint: EndpointOf(origin.LocalAddr()), Data: make([]byte, 65_508)}, syscall.EMSGSIZE},
		{"name", Packet{Endpoint: Endpoint{Name: "example.com", Port: 1}}, errors.ErrUnsupported},
		{"other family", Packet{Endpoint: endpoint("[::1]:1")}, syscall.EAFNOSUPPORT},
	} {
		if err := c.WritePacket(&tt.p); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	if err := c.WritePacket(&Packet{Endpoint: EndpointOf(origin.LocalAddr()), Data: []byte("good")}); err != nil {
		t.Error(err)
	}
}

// An ICMP error names its place, and neither it nor a write that the kernel tells it to ends the conn or costs a datagram.
func TestUDPConnUnreachable(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux tells an unconnected socket")
	}
	for _, tt := range []struct{ network, listen, host string }{
		{"udp4", "127.0.0.1:0", "127.0.0.1"}, {"udp6", "[::1]:0", "::1"}, {"udp", "[::]:0", "127.0.0.1"}, {"udp", "[::]:0", "::1"},
	} {
		c := listenUDP(t, tt.network, tt.listen)
		ip := netip.MustParseAddr(tt.host)
		origin := listenUDP(t, "udp", netip.AddrPortFrom(ip, 0).String())
		gone := listenUDP(t, "udp", netip.AddrPortFrom(ip, 0).String())
		nobody := EndpointOf(gone.LocalAddr())
		gone.Close()
		const rounds = 50
		unreachable, answers := make(chan Endpoint, 2*rounds), make(chan Endpoint, 2*rounds)
		go func() {
			var p Packet
			for {
				switch err := c.ReadPacket(&p).(type) {
				case nil:
					answers <- p.Endpoint
					p.Free()
				case *UnreachableError:
					if errors.Is(err, syscall.ECONNREFUSED) {
						unreachable <- err.To
					}
				default:
					close(answers)
					return
				}
			}
		}()
		for range rounds {
			if err := c.WritePacket(&Packet{Endpoint: nobody, Data: []byte("lost")}); err != nil {
				t.Fatalf("to nobody: %v", err)
			}
			if err := c.WritePacket(&Packet{Endpoint: EndpointOf(origin.LocalAddr()), Data: []byte("x")}); err != nil {
				t.Fatalf("to origin: %v", err)
			}
			var p Packet
			if err := origin.ReadPacket(&p); err != nil {
				t.Fatal(err)
			}
			origin.WritePacket(&p)
			p.Free()
			if e := <-unreachable; e != nobody {
				t.Errorf("%v is unreachable, not %v", e, nobody)
			}
			if e := <-answers; e != EndpointOf(origin.LocalAddr()) {
				t.Errorf("answer of %v", e)
			}
		}
		c.Close()
		for range answers {
		}
	}
}

func TestUDPConnCloseFreesReader(t *testing.T) {
	c := listenUDP(t, "udp", "127.0.0.1:0")
	time.AfterFunc(10*time.Millisecond, func() { c.Close() })
	var p Packet
	if err := c.ReadPacket(&p); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if err := c.WritePacket(&Packet{Endpoint: endpoint("127.0.0.1:9")}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
}

// In the steady state a datagram costs no allocation.
func TestUDPConnDoesNotAllocate(t *testing.T) {
	a, b := listenUDP(t, "udp", "[::]:0"), listenUDP(t, "udp", "127.0.0.1:0")
	p := Packet{Endpoint: EndpointOf(b.LocalAddr()), Data: make([]byte, 1000)}
	var q Packet
	if n := testing.AllocsPerRun(1000, func() {
		a.WritePacket(&p)
		b.ReadPacket(&q)
		q.Free()
	}); n > 0.5 { // the pool may lose one
		t.Errorf("%v allocations", n)
	}
}

// Datagrams that come at once go out at once, and arrive each as it was, in their order.
func TestUDPConnBatches(t *testing.T) {
	for _, host := range []string{"127.0.0.1:0", "[::1]:0"} {
		from, to := listenUDP(t, "udp", host), listenUDP(t, "udp", host)
		e := EndpointOf(to.LocalAddr())
		var ps []Packet
		for i, size := range []int{100, 100, 100, 40, 100, 1400, 1400, 1400, 1401, 0, 0, 7, 30_000, 30_000, 30_000} {
			data := bytes.Repeat([]byte{byte(i)}, size)
			ps = append(ps, Packet{Endpoint: e, Data: data})
		}
		for rest := ps; len(rest) > 0; {
			n, err := from.WritePackets(rest)
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		var got []Packet
		for len(got) < len(ps) {
			batch := make([]Packet, 8)
			if err := to.ReadPacket(&batch[0]); err != nil {
				t.Fatal(err)
			}
			got = append(got, batch[:1+to.ReadMore(batch[1:])]...)
		}
		for i := range ps {
			if !bytes.Equal(got[i].Data, ps[i].Data) || got[i].Endpoint != EndpointOf(from.LocalAddr()) {
				t.Errorf("%d: %d bytes from %v, want %d", i, len(got[i].Data), got[i].Endpoint, len(ps[i].Data))
			}
		}
	}
}

func TestSameSegments(t *testing.T) {
	e, other := endpoint("192.0.2.1:1"), endpoint("192.0.2.1:2")
	packets := func(e Endpoint, sizes ...int) (ps []Packet) {
		for _, n := range sizes {
			ps = append(ps, Packet{Endpoint: e, Data: make([]byte, n)})
		}
		return ps
	}
	for _, tt := range []struct {
		ps   []Packet
		want int
	}{
		{packets(e, 100), 1},
		{packets(e, 100, 100, 100), 3},
		{packets(e, 100, 100, 50, 50), 3}, // a shorter one is the last
		{packets(e, 100, 101), 1},
		{packets(e, 100, 0), 1},
		{packets(e, 0, 0), 1},
		{append(packets(e, 100), packets(other, 100)...), 1},
		{packets(e, make([]int, 200)...), 1},
		{packets(e, 40_000, 40_000), 1},
	} {
		if got := SameSegments(tt.ps); got != tt.want {
			t.Errorf("%d datagrams of %d: %d, want %d", len(tt.ps), len(tt.ps[0].Data), got, tt.want)
		}
	}
	if n := SameSegments(make([]Packet, 1)); n != 1 {
		t.Error(n)
	}
	many := packets(e, func() (s []int) {
		for range 100 {
			s = append(s, 10)
		}
		return s
	}()...)
	if n := SameSegments(many); n != segmentsMax {
		t.Errorf("%d of 100", n)
	}
}
