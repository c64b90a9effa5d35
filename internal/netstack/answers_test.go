package netstack

import (
	"sync"
	"testing"
	"testing/synctest"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/sluice-proxy/sluice/internal/tundev"
)

// stuck is a device whose writes wait until it is freed.
type stuck struct {
	*wire
	freed chan struct{}

	mu      sync.Mutex
	written int
}

func (s *stuck) WritePacket(tundev.Header, [][]byte) error {
	<-s.freed
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written++
	return nil
}

// tcpPacket makes a packet as gVisor sends it.
func tcpPacket(flags header.TCPFlags) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: 64, Payload: buffer.MakeWithData(nil)})
	header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize)).Encode(&header.TCPFields{DataOffset: header.TCPMinimumSize, Flags: flags})
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	return pkt
}

// Answers never hold up who makes them, and nothing is kept of those that wait at the end.
func TestAnswersThatAreNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := &stuck{wire: newWire(), freed: make(chan struct{})}
		l := newLink(dev)
		go l.answers.run()
		pkt := tcpPacket(header.TCPFlagSyn | header.TCPFlagAck)
		defer pkt.DecRef()
		if !l.answers.take(pkt) {
			t.Fatal("the first was not taken")
		}
		synctest.Wait() // it is being written, in vain
		for i := range answersMax {
			if !l.answers.take(pkt) {
				t.Fatalf("no room for %d", i)
			}
		}
		if l.answers.take(pkt) {
			t.Error("more wait than should")
		}
		ended := make(chan struct{})
		go func() {
			l.answers.end()
			close(ended)
		}()
		synctest.Wait()
		select {
		case <-ended:
			t.Error("ended while a packet was being written")
		default:
		}
		close(dev.freed)
		<-ended
		if n := pkt.ReadRefs(); n != 1 {
			t.Errorf("%d references, want 1", n)
		}
		if len(l.answers.waiting) > 0 || dev.written == 0 {
			t.Errorf("%d wait, %d were written", len(l.answers.waiting), dev.written)
		}
	})
}

func TestOnlySYNACKsWait(t *testing.T) {
	l := newLink(newWire())
	for _, flags := range []header.TCPFlags{header.TCPFlagAck, header.TCPFlagRst | header.TCPFlagAck, header.TCPFlagFin | header.TCPFlagAck} {
		pkt := tcpPacket(flags)
		if l.answers.take(pkt) {
			t.Errorf("%v was taken", flags)
		}
		pkt.DecRef()
	}
	pkt := tcpPacket(0)
	pkt.TransportProtocolNumber = header.UDPProtocolNumber
	defer pkt.DecRef()
	if l.answers.take(pkt) {
		t.Error("a datagram was taken")
	}
}
