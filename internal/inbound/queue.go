package inbound

import (
	"sync/atomic"

	"github.com/sluice-proxy/sluice/internal/proxy"
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

// datagramQueue holds what a session has not read yet. What all of a demux hold is counted in held.
type datagramQueue struct{ proxy.PacketQueue }

// push copies a datagram into the queue. It returns false where there is no room.
func (q *datagramQueue) push(to relay.Endpoint, data []byte, held *atomic.Int64) bool {
	n := relay.PacketMemory(len(data))
	if q.Len() >= queueDatagrams || q.Memory()+n > min(queueMemory, allQueues-held.Load()) {
		return false
	}
	p := relay.Packet{Endpoint: to}
	copy(p.Grow(len(data)), data)
	q.Push(p)
	held.Add(n)
	return true
}

// pop takes the first datagram out.
func (q *datagramQueue) pop(held *atomic.Int64) relay.Packet {
	p := q.Pop()
	held.Add(-relay.PacketMemory(len(p.Data)))
	return p
}

// clear drops all, and returns how many there were.
func (q *datagramQueue) clear(held *atomic.Int64) (dropped int64) {
	held.Add(-q.Memory())
	return q.Clear()
}
