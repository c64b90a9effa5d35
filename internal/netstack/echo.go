package netstack

import (
	"context"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The bounds of echo requests.
const (
	echoesMax   = 64 // at a time; further ones are dropped
	echoTimeout = 10 * time.Second
)

// echoes answers echo requests as their destinations do.
type echoes struct {
	r     *running
	slots chan struct{}
}

func (e *echoes) init(r *running) { e.r, e.slots = r, make(chan struct{}, echoesMax) }

// handle takes an ICMP message, whole and reassembled. It is true always: the stack must not answer.
func (e *echoes) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	head := pkt.TransportHeader().Slice()
	if e.r.settings.Ping == nil || len(head) < 4 || head[1] != 0 || !isWay(addrPort(id.RemoteAddress, 1), addrPort(id.LocalAddress, 1)) {
		return true
	}
	if isV4 := id.LocalAddress.Len() == header.IPv4AddressSize; isV4 && head[0] != byte(header.ICMPv4Echo) ||
		!isV4 && head[0] != byte(header.ICMPv6EchoRequest) {
		return true
	}
	message := append(append([]byte(nil), head...), pkt.Data().AsRange().ToSlice()...)
	if len(message) < header.ICMPv4MinimumSize || !pkt.RXChecksumValidated && !isValidICMP(id, message) {
		return true
	}
	select {
	case e.slots <- struct{}{}:
	default:
		return true
	}
	if !e.r.begins() {
		<-e.slots
		return true
	}
	go e.answer(addrPort(id.RemoteAddress, 0).Addr(), addrPort(id.LocalAddress, 0).Addr(), message)
	return true
}

// isValidICMP checks a message's sum, which in IPv6 is over a pseudo header, too.
func isValidICMP(id stack.TransportEndpointID, message []byte) bool {
	sum := uint16(0)
	if id.LocalAddress.Len() == header.IPv6AddressSize {
		sum = header.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, id.RemoteAddress, id.LocalAddress, uint16(len(message)))
	}
	return checksum.Checksum(message, sum) == 0xffff
}

// answer answers a client's request once dst has answered the same.
func (e *echoes) answer(client, dst netip.Addr, message []byte) {
	defer e.r.sessions.Done()
	defer func() { <-e.slots }()
	ctx, cancel := context.WithTimeout(e.r.ctx, echoTimeout)
	defer cancel()
	if err := e.r.settings.Ping(ctx, dst, message[header.ICMPv4MinimumSize:]); err != nil {
		e.r.log.Debug("no answer to an echo request", "client", client, "dst", dst, "err", err)
		return
	}
	proto, reply := tcpip.TransportProtocolNumber(header.ICMPv4ProtocolNumber), byte(header.ICMPv4EchoReply)
	if dst.Is6() {
		proto, reply = header.ICMPv6ProtocolNumber, byte(header.ICMPv6EchoReply)
	}
	p := e.r.newPacket(dst, client, proto, len(message), 0)
	b := p.payload()
	copy(b, message)
	b[0], b[2], b[3] = reply, 0, 0
	e.r.sendICMP(p)
}
