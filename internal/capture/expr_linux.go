package capture

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The functions of this file are the words of rules. Each uses register 1, and leaves nothing in it.

func join(parts ...[]expr.Any) (all []expr.Any) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func equals(data ...byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func protocol(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equals(number)}
}

func nfproto(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equals(number)}
}

// incoming matches what comes in at an interface, which need not be there yet.
func incoming(name string) []expr.Any {
	var padded [unix.IFNAMSIZ]byte
	copy(padded[:], name)
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equals(padded[:]...)}
}

// masked matches packets by a part of their mark.
func masked(mask, mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(mask), Xor: native(0)},
		equals(native(mark)...),
	}
}

// marked matches packets of connections with a mark.
func marked(mark uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, equals(native(mark)...)}
}

func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: native(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}
}

// setConnMark marks the packet's connection.
func setConnMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: native(mark)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
	}
}

// original is the direction of the packets that go the way of a connection's first.
const original = 0

func direction(d byte) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equals(d)}
}

// begun matches packets of connections of which the kernel has not seen an answer or a second packet.
func begun() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(expr.CtStateBitNEW), Xor: native(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native(0)},
	}
}

// syn matches the first segment of a TCP connection.
func syn() []expr.Any {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		equals(syn),
	}
}

// toPort matches packets of TCP and UDP to a port.
func toPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		equals(binary.BigEndian.AppendUint16(nil, port)...),
	}
}

// addressType matches destinations by what they are to this machine.
func addressType(typ byte) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
		equals(native(uint32(typ))...),
	}
}

// address loads an address of the packet, whose family is known to be that.
func address(v6, source bool) *expr.Payload {
	p := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: net.IPv4len}
	if v6 {
		p.Offset, p.Len = 24, net.IPv6len
	}
	if source {
		p.Offset -= p.Len
	}
	return p
}

// within matches packets with an address in p.
func within(p netip.Prefix, source bool) []expr.Any {
	family := byte(unix.NFPROTO_IPV4)
	if p.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	size := p.Addr().BitLen()
	return join(nfproto(family), []expr.Any{
		address(p.Addr().Is6(), source),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size / 8),
			Mask: net.CIDRMask(p.Bits(), size), Xor: make([]byte, size/8)},
		equals(p.Masked().Addr().AsSlice()...),
	})
}

// inSet matches packets whose destination is in s, or is not. Their family is known to be that of s.
func inSet(s *nftables.Set, not bool) []expr.Any {
	return []expr.Any{
		address(s.KeyType.Bytes == net.IPv6len, false),
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: not},
	}
}

func jump(to *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to.Name}}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }
