package inbound

import (
	"sync/atomic"

	"github.com/sluice-proxy/sluice/relay"
)

// The bounds on what waits for sessions that are slow to take it. What does not fit is dropped, as on any congested link.
//
// One session has room for some 50 ms of 500 Mbit/s, for as long as a busy machine may leave its goroutine alone. All of a demux
// together have no more than allQueues, however many there are and whoever makes them up: sources can be forged. A session may hold no more than is
// free of that, so that a few that are not read leave room for the others.
const (
	queueDatagrams = 2048     // of one session
	queueMemory    = 4 << 20  // of one session, as PacketMemory counts it
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
	if len(q.packets)-q.head >= queueDatagrams || q.memory+n > min(queueMemory, allQueues-held.Load()) {
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

// clear drops all, and returns how many there were.
func (q *datagramQueue) clear(held *atomic.Int64) (dropped int64) {
	for ; !q.empty(); dropped++ {
		p := q.pop(held)
		p.Free()
	}
	q.packets = nil
	return dropped
}
