package dns

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// fill pushes datagrams of so many bytes until there is no room, and returns how many went in.
func fill(q *packetQueue, m *memory, size int) (n int) {
	for {
		var p relay.Packet
		p.Grow(size)
		if !q.push(&p, m) {
			p.Free()
			return n
		}
		n++
	}
}

func TestQueuesAreBoundedInBytes(t *testing.T) {
	const most = 64 << 10
	for _, size := range []int{1, 60_000} {
		var all atomic.Int64
		var queues []*packetQueue
		sessions := make([]*memory, 100)
		for i := range sessions {
			m := &memory{all: &all}
			sessions[i] = m
			for lane := range 8 {
				q := new(packetQueue)
				queues = append(queues, q)
				if n := fill(q, m, size); n > laneQueue {
					t.Fatalf("a lane has %d datagrams", n)
				}
				if free := sessionQueues - m.held.Load(); lane == 0 && free < sessionQueues/2-most {
					t.Fatalf("one lane left %d bytes of its session's", free)
				}
			}
			if held := m.held.Load(); held > sessionQueues {
				t.Fatalf("a session holds %d bytes", held)
			}
			if free := allQueues - all.Load(); free < 0 || i < 16 && free < sessionQueues/2 {
				t.Fatalf("%d sessions left %d bytes", i+1, free)
			}
		}
		dropped := int64(0)
		for i, q := range queues {
			dropped += q.clear(sessions[i/8])
		}
		if all.Load() != 0 || dropped == 0 {
			t.Errorf("%d bytes are held of nothing; %d datagrams were dropped", all.Load(), dropped)
		}
	}
}

func TestQueuesOfManyGoroutinesAreBounded(t *testing.T) {
	var all atomic.Int64
	var working sync.WaitGroup
	for range 64 {
		working.Go(func() {
			m := &memory{all: &all}
			var q packetQueue
			for range 20 {
				fill(&q, m, 60_000)
				if held := all.Load(); held > allQueues {
					t.Errorf("%d bytes are held", held)
				}
				q.clear(m)
			}
		})
	}
	working.Wait()
	if all.Load() != 0 {
		t.Errorf("%d bytes are held of nothing", all.Load())
	}
}

func TestQueueKeepsTheOrder(t *testing.T) {
	m := &memory{all: new(atomic.Int64)}
	var q packetQueue
	in, out := uint16(0), uint16(0)
	for range 300 {
		for range 3 {
			p := relay.Packet{Endpoint: relay.Endpoint{Port: in}}
			p.Data = p.Grow(60_000)[:2] // as a conn has it that cannot know the size before
			p.Data[0], p.Data[1] = byte(in>>8), byte(in)
			if !q.push(&p, m) {
				t.Fatalf("no room for datagram %d", in)
			}
			p.Free()
			in++
		}
		for range 3 - int(in/3)%2 {
			if q.Len() == 0 {
				break
			}
			p := q.pop(m)
			if p.Endpoint.Port != out || whole16(p.Data) != out || cap(p.Data) > 2<<10 {
				t.Fatalf("datagram %d is %v %x, in %d bytes", out, p.Endpoint, p.Data, cap(p.Data))
			}
			p.Free()
			out++
		}
	}
	if n := q.clear(m); n != int64(in-out) || m.all.Load() != 0 || m.held.Load() != 0 {
		t.Errorf("%d of %d were left, and %d bytes are held", n, in-out, m.all.Load())
	}
}

// hanging is a Next whose dial to all but the names "ok.example" never ends before it is told.
type hanging struct {
	proxytest.RecordingHandler
	stop    chan struct{}
	dropped atomic.Int64
}

func (n *hanging) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	if f.Dst.Host == "ok.example" {
		n.RecordingHandler.HandlePackets(ctx, f, c)
		return
	}
	<-n.stop
	c.Close()
	n.dropped.Add(c.(relay.Dropper).Dropped())
}

func TestSessionsThatNobodyReadsTakeBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const sessions, lanes, each = 24, 4, 30
		next := &hanging{stop: make(chan struct{})}
		h := &Handler{names: names{fixed: true}, Next: next}
		ok := fakeOf(t, h, "ok.example").String() + ":9"
		var to []string
		for i := range lanes {
			to = append(to, fakeOf(t, h, fmt.Sprintf("h%d.example", i)).String()+":9")
		}
		data := make([]byte, 60_000)
		var ends []func()
		for range sessions {
			c, other := newClient(), newClient()
			ends = append(ends, serve(t, h, c, "10.0.0.53:53"))
			for i := range lanes * each {
				c.send(to[i/each], data)
			}
			synctest.Wait()
			end := serve(t, h, other, "10.0.0.53:53")
			other.send(ok, []byte("x"))
			if got := other.next(t); got.Endpoint != endpoint(ok) {
				t.Errorf("got one from %v", got.Endpoint)
			}
			end()
			if held := h.queued.Load(); held > allQueues {
				t.Fatalf("%d bytes are held", held)
			}
		}
		if held := h.queued.Load(); held < allQueues/2 {
			t.Errorf("only %d bytes are held: too few for the test", held)
		}
		close(next.stop)
		synctest.Wait()
		if n := next.dropped.Load(); n != sessions*lanes*each {
			t.Errorf("%d datagrams of %d count as dropped", n, sessions*lanes*each)
		}
		for _, end := range ends {
			end()
		}
		if held := h.queued.Load(); held != 0 {
			t.Errorf("%d bytes are held after the end", held)
		}
	})
}

func TestPortsOfANameAreBounded(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: new(proxytest.RecordingHandler)}
	ip := fakeOf(t, h, "a.example")
	l := &lane{s: &session{h: h}, fake: ip, name: &entry{name: "a.example"}, ports: make(map[uint16]bool)}
	for port := range uint16(65535) {
		p := relay.Packet{Endpoint: relay.Endpoint{IP: ip, Port: port}}
		l.toName(&p)
		if from := l.fromFake(relay.Endpoint{IP: endpoint("192.0.2.1:1").IP, Port: port}); from.IP != ip {
			t.Fatalf("an answer from port %d comes from %v", port, from)
		}
	}
	if n := len(l.ports); n > portsMax {
		t.Errorf("%d ports are kept", n)
	}
}
