package proxy

import "github.com/sluice-proxy/sluice/relay"

// PacketQueue holds datagrams in their order for who is slow to take them, and knows what memory they have. How much it may
// hold is its owner's to say, and so is the lock. The zero value is empty.
type PacketQueue struct {
	packets []relay.Packet
	head    int   // of packets, those before it are gone
	memory  int64 // of those that are there
}

// Len returns how many datagrams wait.
func (q *PacketQueue) Len() int { return len(q.packets) - q.head }

// Memory returns what the datagrams that wait have, as [relay.PacketMemory] counts it.
func (q *PacketQueue) Memory() int64 { return q.memory }

// Push puts p behind the others. Its memory is the queue's from then on.
func (q *PacketQueue) Push(p relay.Packet) {
	if q.head > 0 && len(q.packets) == cap(q.packets) {
		kept := copy(q.packets, q.packets[q.head:])
		clear(q.packets[kept:])
		q.packets, q.head = q.packets[:kept], 0
	}
	q.packets = append(q.packets, p)
	q.memory += relay.PacketMemory(len(p.Data))
}

// Pop takes the first datagram out, of which there must be one. Its memory is the caller's.
func (q *PacketQueue) Pop() relay.Packet {
	p := q.packets[q.head]
	q.packets[q.head] = relay.Packet{}
	q.memory -= relay.PacketMemory(len(p.Data))
	if q.head++; q.Len() == 0 {
		const kept = 16 // no more memory than that for who is idle
		q.head = 0
		if q.packets = q.packets[:0]; cap(q.packets) > kept {
			q.packets = nil
		}
	}
	return p
}

// Clear frees all datagrams, and returns how many there were.
func (q *PacketQueue) Clear() (dropped int64) {
	for ; q.Len() > 0; dropped++ {
		p := q.Pop()
		p.Free()
	}
	q.packets = nil
	return dropped
}
