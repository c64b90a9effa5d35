package socks5

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// Place is where a datagram goes to or comes from: an IP address, or a name, and a port.
type Place struct {
	IP   netip.Addr // the zero Addr where Name stands for it
	Name string
	Port uint16
}

// ErrFragment is what a datagram is that has only a part of the payload. RFC 1928 section 7 lets who does not put
// fragments together drop them, and nobody sends any.
var ErrFragment = errors.New("socks5: a fragment of a datagram")

// MaxDatagramHeader is the length of the longest header: that of a name.
const MaxDatagramHeader = addrHost + 1 + 255 + 2

// ParseDatagram reads a datagram as it goes between client and server, RFC 1928 section 7: the place that it is for or from,
// and its payload, which is the rest of b. The error is [ErrFragment], or wraps [ErrMalformed].
func ParseDatagram(b []byte) (p Place, payload []byte, err error) {
	const fragment = 2 // behind two reserved bytes, which may be anything
	if len(b) < shortest {
		return Place{}, nil, malformed("datagram: %d bytes", len(b))
	}
	if b[fragment] != 0 {
		return Place{}, nil, ErrFragment
	}
	begin, size := addrHost, 0
	switch b[addrType] {
	case typeIPv4:
		size = 4
	case typeIPv6:
		size = 16
	case typeName:
		begin, size = addrHost+1, int(b[addrHost])
	default:
		return Place{}, nil, malformed("datagram: %w %d", errAddrType, b[addrType])
	}
	end := begin + size
	if len(b) < end+2 {
		return Place{}, nil, malformed("datagram: ends in its header")
	}
	p.Port, payload = binary.BigEndian.Uint16(b[end:]), b[end+2:]
	if b[addrType] != typeName {
		ip, _ := netip.AddrFromSlice(b[begin:end])
		p.IP = ip.Unmap()
		return p, payload, nil
	}
	host, ok := normalHost(string(b[begin:end]))
	if !ok {
		return Place{}, nil, malformed("datagram: %q is not the name of a host", b[begin:end])
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		p.IP = ip.WithZone("") // a zone of another machine's means nothing here
	} else {
		p.Name = host
	}
	return p, payload, nil
}

// AppendDatagram appends a datagram for or from p: a header, of [MaxDatagramHeader] bytes at most, and the payload.
func AppendDatagram(b []byte, p Place, payload []byte) ([]byte, error) {
	b = append(b, 0, 0, 0)
	if p.IP.IsValid() {
		b = appendIP(b, p.IP.Unmap())
		b = binary.BigEndian.AppendUint16(b, p.Port)
	} else {
		var err error
		if b, err = appendAddr(b, Addr{p.Name, p.Port}); err != nil {
			return nil, err
		}
	}
	return append(b, payload...), nil
}
