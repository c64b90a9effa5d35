package netstack

import (
	"encoding/binary"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Packets that are made here and not by gVisor: datagrams, ICMP errors, and echo replies.

// udpSum is where the sum is in the header of a datagram.
const udpSum = 6

// ttl is that of the packets made here.
const ttl = 64

// packet is an IP packet without extensions that is being made.
type packet struct {
	b  []byte // all headers, and what follows them
	ip int    // the length of IP's
}

// newPacket begins a packet with room for n bytes after IP's header. extra more bytes will follow those.
func (r *running) newPacket(src, dst netip.Addr, proto tcpip.TransportProtocolNumber, n, extra int) packet {
	if src.Is4() {
		p := packet{make([]byte, header.IPv4MinimumSize+n), header.IPv4MinimumSize}
		h := header.IPv4(p.b)
		h.Encode(&header.IPv4Fields{
			TotalLength: uint16(len(p.b) + extra), ID: uint16(r.packetID.Add(1)), TTL: ttl, Protocol: uint8(proto),
			SrcAddr: tcpip.AddrFrom4(src.As4()), DstAddr: tcpip.AddrFrom4(dst.As4()),
		})
		h.SetChecksum(^h.CalculateChecksum())
		return p
	}
	p := packet{make([]byte, header.IPv6MinimumSize+n), header.IPv6MinimumSize}
	header.IPv6(p.b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(n + extra), TransportProtocol: proto, HopLimit: ttl,
		SrcAddr: tcpip.AddrFrom16(src.As16()), DstAddr: tcpip.AddrFrom16(dst.As16()),
	})
	return p
}

func (p packet) payload() []byte { return p.b[p.ip:] }

// datagramMax is how many bytes a datagram from an address can have.
func datagramMax(from netip.AddrPort) int {
	if from.Addr().Is4() {
		return 65535 - header.IPv4MinimumSize - header.UDPMinimumSize
	}
	return 65535 - header.UDPMinimumSize
}

// sendUDP sends a datagram to a client.
func (r *running) sendUDP(from, to netip.AddrPort, data []byte) error {
	src, dst := tcpip.AddrFromSlice(from.Addr().AsSlice()), tcpip.AddrFromSlice(to.Addr().AsSlice())
	length := uint16(header.UDPMinimumSize + len(data))
	sum := header.PseudoHeaderChecksum(udp.ProtocolNumber, src, dst, length)
	fields := header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: length}
	if header.IPv6MinimumSize+int(length) > int(r.link.MTU()) {
		return r.sendLongUDP(src, dst, sum, fields, data)
	}
	p := r.newPacket(from.Addr(), to.Addr(), udp.ProtocolNumber, header.UDPMinimumSize, len(data))
	fields.Checksum = sum // of the pseudo header: the rest is the kernel's
	header.UDP(p.payload()).Encode(&fields)
	h := tundev.Header{NeedsCsum: true, CsumStart: uint16(p.ip), CsumOffset: udpSum}
	return r.link.dev.WritePacket(h, [][]byte{p.b, data})
}

// sendLongUDP sends a datagram in fragments.
func (r *running) sendLongUDP(src, dst tcpip.Address, sum uint16, fields header.UDPFields, data []byte) error {
	proto := header.IPv4ProtocolNumber
	if src.Len() == header.IPv6AddressSize {
		proto = header.IPv6ProtocolNumber
	}
	route, err := r.stack.FindRoute(nicID, src, dst, proto, false)
	if err != nil {
		return &net.OpError{Op: "write", Net: "udp", Err: errnoOf(err)}
	}
	defer route.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(data),
	})
	defer pkt.DecRef()
	h := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	pkt.TransportProtocolNumber = udp.ProtocolNumber
	h.Encode(&fields)
	h.SetChecksum(^h.CalculateChecksum(checksum.Checksum(data, sum)))
	if err := route.WritePacket(stack.NetworkHeaderParams{Protocol: udp.ProtocolNumber, TTL: ttl}, pkt); err != nil {
		return &net.OpError{Op: "write", Net: "udp", Err: errnoOf(err)}
	}
	return nil
}

// sendProbe sends a segment without flags.
func (r *running) sendProbe(id stack.TransportEndpointID, seq uint32) {
	src, dst := addrPort(id.LocalAddress, 0).Addr(), addrPort(id.RemoteAddress, 0).Addr()
	p := r.newPacket(src, dst, header.TCPProtocolNumber, header.TCPMinimumSize, 0)
	h := header.TCP(p.payload())
	h.Encode(&header.TCPFields{SrcPort: id.LocalPort, DstPort: id.RemotePort, SeqNum: seq, DataOffset: header.TCPMinimumSize})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, id.LocalAddress, id.RemoteAddress, header.TCPMinimumSize)
	h.SetChecksum(^h.CalculateChecksum(sum))
	r.link.dev.WritePacket(tundev.Header{}, [][]byte{p.b})
}

// unreachableCodes are the codes of ICMP's and ICMPv6's message, by reason. For others the port is unreachable.
var unreachableCodes = map[proxy.Reason]struct{ v4, v6 byte }{
	proxy.NetUnreachable:  {0, 0},
	proxy.HostUnreachable: {1, 3},
	proxy.NoHost:          {1, 3},
	proxy.Denied:          {13, 1},
}

// unreachable tells the sender of a SYN that it cannot be delivered.
func (r *running) unreachable(id stack.TransportEndpointID, seq uint32, why proxy.Reason) {
	h := make([]byte, header.TCPMinimumSize)
	header.TCP(h).Encode(&header.TCPFields{
		SrcPort: id.RemotePort, DstPort: id.LocalPort, SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn,
	})
	r.sendUnreachable(addrPort(id.LocalAddress, 0).Addr(), addrPort(id.RemoteAddress, 0).Addr(), header.TCPProtocolNumber, h, why)
}

// refuseUDP tells a client that its datagrams to a place cannot be delivered.
func (r *running) refuseUDP(place, client netip.AddrPort, why proxy.Reason) {
	if why == proxy.Timeout || why == proxy.Canceled {
		return
	}
	h := make([]byte, header.UDPMinimumSize)
	header.UDP(h).Encode(&header.UDPFields{SrcPort: client.Port(), DstPort: place.Port(), Length: header.UDPMinimumSize})
	r.sendUnreachable(place.Addr(), client.Addr(), udp.ProtocolNumber, h, why)
}

// sendUnreachable quotes a packet from client to place that begins with h.
func (r *running) sendUnreachable(place, client netip.Addr, proto tcpip.TransportProtocolNumber, h []byte, why proxy.Reason) {
	codes, ok := unreachableCodes[why]
	if !ok {
		codes.v4, codes.v6 = 3, 4
	}
	quoted := r.newPacket(client, place, proto, len(h), 0)
	copy(quoted.payload(), h)
	const head = 8 // both ICMPs begin with type, code, checksum, and 4 bytes of no use here
	if place.Is4() {
		p := r.newPacket(place, client, header.ICMPv4ProtocolNumber, head+len(quoted.b), 0)
		m := header.ICMPv4(p.payload())
		m.SetType(header.ICMPv4DstUnreachable)
		m.SetCode(header.ICMPv4Code(codes.v4))
		copy(m[head:], quoted.b)
		r.sendICMP(p)
		return
	}
	p := r.newPacket(place, client, header.ICMPv6ProtocolNumber, head+len(quoted.b), 0)
	m := header.ICMPv6(p.payload())
	m.SetType(header.ICMPv6DstUnreachable)
	m.SetCode(header.ICMPv6Code(codes.v6))
	copy(m[head:], quoted.b)
	r.sendICMP(p)
}

// sendICMP sums p and sends it. A message that gets lost is none of ours.
func (r *running) sendICMP(p packet) {
	b := p.payload()
	sum := uint16(0)
	if p.ip == header.IPv6MinimumSize {
		ip := header.IPv6(p.b)
		sum = header.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(b)))
	}
	binary.BigEndian.PutUint16(b[2:], ^checksum.Checksum(b, sum))
	r.link.dev.WritePacket(tundev.Header{}, [][]byte{p.b})
}
