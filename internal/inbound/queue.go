package inbound

import (
	"sync/atomic"

	"github.com/sluice-proxy/sluice/relay"
)

// The bounds on what waits for sessions that are slow to take it. What does not fit is dropped, as on any congested link.
const (
	queueDatagrams = 512      // of one session
	queueMemory    = 1 << 20  // of one session
	allQueues      = 64 << 20 // of all sessions of a demux
)

// datagramQueue holds what a session has not read yet.
type datagramQueue struct {
	packets []relay.Packet
	head    int   // of packets, those before it are gone
	memory  int64 // of those that are there
}

func (q *datagramQueue) empty() bool { return q.head == len(q.packets) }

// push copies a datagram into the queue, and adds its memory to held. It returns false where there is no room.
func (q *datagramQueue) push(to relay.Endpoint, data []byte, held *atomic.Int64) bool {
	n := relay.PacketMemory(len(data))
	if len(q.packets)-q.head >= queueDatagrams || q.memory+n > queueMemory || held.Load()+n > allQueues {
		return false
	}
	if q.head > 0 && len(q.packets) == cap(q.packets) {
		kept := copy(q.packets, q.packets[q.head:])
		clear(q.packets[kept:])
		q.packets, q.head = q.packets[:kept], 0
	}
	q.packets = append(q.packets, relay.Packet{Endpoint: to})
	p := &q.packets[len(q.packets)-1]
	copy(p.Grow(len(data)), data)
	q.memory += n
	held.Add(n)
	return true
}

// pop takes the first datagram out.
func (q *datagramQueue) pop(held *atomic.Int64) relay.Packet {
	p := q.packets[q.head]
	q.packets[q.head] = relay.Packet{}
	n := relay.PacketMemory(len(p.Data))
	q.memory -= n
	held.Add(-n)
	if q.head++; q.empty() {
		const kept = 16 // no more memory than that for who is idle
		q.head = 0
		if q.packets = q.packets[:0]; cap(q.packets) > kept {
			q.packets = nil
		}
	}
	return p
}

// clear drops all.
func (q *datagramQueue) clear(held *atomic.Int64) {
	for !q.empty() {
		p := q.pop(held)
		p.Free()
	}
	q.packets = nil
}
