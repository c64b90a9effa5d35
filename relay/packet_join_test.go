package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// queueConn is a PacketConn made of two queues.
type queueConn struct {
	in     chan Packet // an empty Endpoint with nil Data: an UnreachableError
	out    chan Packet
	refuse chan Endpoint
	fail   error // of every WritePacket
	once   sync.Once
	closed chan struct{}
}

func newQueueConn() *queueConn {
	return &queueConn{
		in: make(chan Packet, 100), out: make(chan Packet, 100), refuse: make(chan Endpoint, 100), closed: make(chan struct{}),
	}
}

func (c *queueConn) ReadPacket(p *Packet) error {
	select {
	case q := <-c.in:
		if q.Data == nil {
			return &UnreachableError{To: q.Endpoint, Err: syscall.ECONNREFUSED}
		}
		*p = q
		return nil
	case <-c.closed:
		return net.ErrClosed
	}
}

func (c *queueConn) WritePacket(p *Packet) error {
	if c.fail != nil {
		return c.fail
	}
	c.out <- Packet{Endpoint: p.Endpoint, Data: append([]byte{}, p.Data...)}
	return nil
}

func (c *queueConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *queueConn) Refuse(e Endpoint, err error) {
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EMSGSIZE) {
		c.refuse <- e
	}
}

func endpoint(s string) Endpoint { return EndpointOf(netip.MustParseAddrPort(s)) }

func TestSamePlace(t *testing.T) {
	named, numbered := endpoint("[fe80::1%eth0]:53"), endpoint("[fe80::1%2]:53")
	for _, tt := range []struct {
		e, f Endpoint
		want bool
	}{
		{named, numbered, true},
		{named, endpoint("[fe80::1]:53"), true},
		{named, endpoint("[fe80::2%2]:53"), false},
		{named, endpoint("[fe80::1%2]:54"), false},
		{endpoint("192.0.2.1:53"), endpoint("192.0.2.1:53"), true},
		{Endpoint{Name: "x", Port: 53}, Endpoint{Name: "x", Port: 53}, true},
		{Endpoint{Name: "x", Port: 53}, Endpoint{Name: "y", Port: 53}, false},
	} {
		if got := tt.e.SamePlace(tt.f); got != tt.want || tt.f.SamePlace(tt.e) != tt.want {
			t.Errorf("%v and %v: %v", tt.e, tt.f, got)
		}
	}
}

// joinPackets runs JoinPackets and returns its result once it has ended.
func joinPackets(ctx context.Context, r *Relay, st *PacketStats) (client, origin *queueConn, over <-chan PacketResult) {
	client, origin = newQueueConn(), newQueueConn()
	done := make(chan PacketResult, 1)
	go func() { done <- r.JoinPackets(ctx, client, origin, st) }()
	return client, origin, done
}

func TestPacketsMoveBothWays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		var st PacketStats
		client, origin, over := joinPackets(ctx, new(Relay), &st)
		first, second := endpoint("192.0.2.1:1000"), Endpoint{Name: "example.com", Port: 2000}
		client.in <- Packet{Endpoint: first, Data: []byte("one")}
		client.in <- Packet{Endpoint: second, Data: []byte("")}
		for _, want := range []Packet{{Endpoint: first, Data: []byte("one")}, {Endpoint: second, Data: []byte("")}} {
			if got := <-origin.out; got.Endpoint != want.Endpoint || string(got.Data) != string(want.Data) {
				t.Errorf("origin got %v %q", got.Endpoint, got.Data)
			}
		}
		origin.in <- Packet{Endpoint: first, Data: []byte("back")}
		if got := <-client.out; got.Endpoint != first || string(got.Data) != "back" {
			t.Errorf("client got %v %q", got.Endpoint, got.Data)
		}
		origin.in <- Packet{Endpoint: first} // unreachable
		if got := <-client.refuse; got != first {
			t.Errorf("client was told of %v", got)
		}
		origin.fail = syscall.EMSGSIZE
		client.in <- Packet{Endpoint: second, Data: make([]byte, 10)}
		if got := <-client.refuse; got != second {
			t.Errorf("client was told of %v", got)
		}
		cause := errors.New("enough")
		cancel(cause)
		if res := <-over; res.Err != cause || res.End != Canceled || res.First != Neither {
			t.Errorf("result: %+v", res)
		}
		up, down := st.Packets()
		upBytes, downBytes := st.Bytes()
		lost, none := st.Dropped()
		if up != 2 || down != 1 || upBytes != 3 || downBytes != 4 || lost != 1 || none != 0 {
			t.Errorf("counted %d %d packets, %d %d bytes, %d %d dropped", up, down, upBytes, downBytes, lost, none)
		}
	})
}

func TestPacketsAreOverWhenSilent(t *testing.T) {
	for _, tt := range []struct {
		name string
		idle time.Duration
		port uint16
		want time.Duration
	}{
		{"default", 0, 443, DefaultPacketIdle},
		{"DNS", 0, 53, DefaultDNSIdle},
		{"given", time.Minute, 53, time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				client, origin, over := joinPackets(t.Context(), &Relay{PacketIdle: tt.idle}, nil)
				client.in <- Packet{Endpoint: Endpoint{Name: "x", Port: tt.port}, Data: []byte("x")}
				time.Sleep(tt.want - time.Second)
				origin.in <- Packet{Endpoint: Endpoint{Name: "x", Port: tt.port}, Data: []byte("y")}
				res := <-over
				if took := time.Since(start); res.Err != ErrIdle || res.End != Idle || took != 2*tt.want-time.Second {
					t.Errorf("%+v after %v", res, took)
				}
			})
		})
	}
}

func TestPacketsFailWithTheirConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, origin, over := joinPackets(t.Context(), new(Relay), nil)
		origin.Close()
		if res := <-over; !errors.Is(res.Err, net.ErrClosed) || res.First != B || res.End != Read {
			t.Errorf("%+v", res)
		}
	})
}

func TestPacketRateAndQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		client, origin, over := joinPackets(t.Context(), &Relay{Rate: 1000, Quota: 5000}, nil)
		for range 6 {
			client.in <- Packet{Endpoint: endpoint("192.0.2.1:1000"), Data: make([]byte, 1000)}
		}
		res := <-over
		if took := time.Since(start); len(origin.out) != 5 || res.End != Quota || took < 3*time.Second || took > 6*time.Second {
			t.Errorf("%d passed, %+v after %v", len(origin.out), res, took)
		}
	})
}

// batchConn has all that waits at once.
type batchConn struct{ *queueConn }

func (c batchConn) ReadMore(ps []Packet) (n int) {
	for n < len(ps) && len(c.in) > 0 {
		ps[n] = <-c.in
		n++
	}
	return n
}

// TestDatagramsOfABatchThatIsClosedCountAsDropped: all of those that could not be written any more.
func TestDatagramsOfABatchThatIsClosedCountAsDropped(t *testing.T) {
	st := new(PacketStats)
	client, origin := newQueueConn(), newQueueConn()
	origin.fail = net.ErrClosed
	for range 5 {
		client.in <- Packet{Endpoint: endpoint("192.0.2.1:1"), Data: []byte("x")}
	}
	new(Relay).JoinPackets(t.Context(), batchConn{client}, origin, st)
	if n, _ := st.Dropped(); n != 5 {
		t.Errorf("%d dropped, want 5", n)
	}
}
