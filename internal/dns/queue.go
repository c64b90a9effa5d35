package dns

import (
	"sync/atomic"

	"github.com/sluice-proxy/sluice/internal/proxy"
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
type packetQueue struct{ proxy.PacketQueue }

// push takes over the memory of p, and returns whether there was room.
func (q *packetQueue) push(p *relay.Packet, m *memory) bool {
	n := relay.PacketMemory(len(p.Data))
	if q.Len() >= laneQueue || !m.take(n, q.Memory()) {
		return false
	}
	if int64(cap(p.Data)) <= n {
		q.Push(*p)
		*p = relay.Packet{}
		return true
	}
	small := relay.Packet{Endpoint: p.Endpoint} // it came in memory for a larger one
	copy(small.Grow(len(p.Data)), p.Data)
	q.Push(small)
	return true
}

// pop takes the first datagram out.
func (q *packetQueue) pop(m *memory) relay.Packet {
	p := q.Pop()
	m.free(relay.PacketMemory(len(p.Data)))
	return p
}

// clear drops all, and returns how many there were.
func (q *packetQueue) clear(m *memory) (dropped int64) {
	m.free(q.Memory())
	return q.Clear()
}
