package dns

import (
	"sync/atomic"

	"github.com/sluice-proxy/sluice/relay"
)

// The bounds on what waits for lanes that are slow to take it, as one does whose dial hangs. What does not fit is
// dropped, as on any congested link.
//
// A lane may hold no more than it leaves free of its session's memory, and a session no more than it leaves of the
// Handler's: so a few that are not read leave room for the others, however many there are and whoever makes them up.
const (
	laneQueue     = 512      // datagrams of one lane
	sessionQueues = 4 << 20  // bytes of all lanes of a session, as relay.PacketMemory counts them
	allQueues     = 64 << 20 // bytes of all lanes of a Handler
)

// memory is what the queues of one session hold, which is part of what all of the Handler's do.
type memory struct {
	all  *atomic.Int64
	held atomic.Int64
}

// take adds n bytes for a lane that holds own, and returns whether there is room for them.
func (m *memory) take(n, own int64) bool {
	for {
		all, held := m.all.Load(), m.held.Load()
		if held+n > min(sessionQueues, allQueues-all-n) || own+n > sessionQueues-held-n {
			return false
		}
		if m.all.CompareAndSwap(all, all+n) {
			m.held.Add(n) // by one goroutine at a time: whoever reads the session's conn
			return true
		}
	}
}

func (m *memory) free(n int64) {
	m.held.Add(-n)
	m.all.Add(-n)
}

// packetQueue holds the datagrams of a lane that it has not read yet.
type packetQueue struct {
	packets []relay.Packet
	head    int   // of packets, those before it are gone
	held    int64 // bytes
}

func (q *packetQueue) empty() bool { return q.head == len(q.packets) }

// push takes over the memory of p, and returns whether there was room.
func (q *packetQueue) push(p *relay.Packet, m *memory) bool {
	n := relay.PacketMemory(len(p.Data))
	if len(q.packets)-q.head >= laneQueue || !m.take(n, q.held) {
		return false
	}
	q.held += n
	if q.head > 0 && len(q.packets) == cap(q.packets) {
		kept := copy(q.packets, q.packets[q.head:])
		clear(q.packets[kept:])
		q.packets, q.head = q.packets[:kept], 0
	}
	if int64(cap(p.Data)) <= n {
		q.packets = append(q.packets, *p)
		*p = relay.Packet{}
		return true
	}
	small := relay.Packet{Endpoint: p.Endpoint} // it came in memory for a larger one
	copy(small.Grow(len(p.Data)), p.Data)
	q.packets = append(q.packets, small)
	return true
}

// pop takes the first datagram out.
func (q *packetQueue) pop(m *memory) relay.Packet {
	p := q.packets[q.head]
	q.packets[q.head] = relay.Packet{}
	n := relay.PacketMemory(len(p.Data))
	q.held -= n
	m.free(n)
	if q.head++; q.empty() {
		const kept = 16 // no more memory than that for who is idle
		q.head = 0
		if q.packets = q.packets[:0]; cap(q.packets) > kept {
			q.packets = nil
		}
	}
	return p
}

// clear drops all, and returns how many there were.
func (q *packetQueue) clear(m *memory) (dropped int64) {
	for ; !q.empty(); dropped++ {
		p := q.pop(m)
		p.Free()
	}
	q.packets = nil
	return dropped
}
