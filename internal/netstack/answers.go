package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// answers are the SYN-ACKs to be written. A client on this machine has its ACK on the way before the write of the SYN-ACK returns, and
// gVisor holds the endpoint's lock during that: the goroutine that is to take the ACK would spin until the lock is free.
// So they are handed to a goroutine that holds none.
type answers struct {
	link    *link
	waiting chan *stack.PacketBuffer
	ending  chan struct{}
	ended   chan struct{}
}

// answersMax is how many wait at most; further ones are written at once.
const answersMax = 256

func (a *answers) init(l *link) {
	a.link, a.waiting = l, make(chan *stack.PacketBuffer, answersMax)
	a.ending, a.ended = make(chan struct{}), make(chan struct{})
}

// take takes a packet if it is a SYN-ACK and there is room. It does not block, and holds a reference until the packet is written.
func (a *answers) take(pkt *stack.PacketBuffer) bool {
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber {
		return false
	}
	b := pkt.TransportHeader().Slice()
	if len(b) < header.TCPMinimumSize || header.TCP(b).Flags()&header.TCPFlagSyn == 0 {
		return false
	}
	pkt.IncRef()
	select {
	case a.waiting <- pkt:
		return true
	default:
		pkt.DecRef()
		return false
	}
}

// run writes them until end is called.
func (a *answers) run() {
	defer close(a.ended)
	for {
		select {
		case pkt := <-a.waiting:
			a.link.write(pkt)
			pkt.DecRef()
		case <-a.ending:
			return
		}
	}
}

// end ends run, waits for that, and forgets those that were not written. It is called once, when nobody waits for an answer.
func (a *answers) end() {
	close(a.ending)
	<-a.ended
	for {
		select {
		case pkt := <-a.waiting:
			pkt.DecRef()
		default:
			return
		}
	}
}
