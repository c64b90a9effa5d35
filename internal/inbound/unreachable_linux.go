package inbound

import (
	"encoding/binary"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// refuseDatagram tells a client, by ICMP, that its datagram to local could not be delivered because of err, where ICMP has words for that
// and we have CAP_NET_RAW. It does not block.
func refuseDatagram(client, local netip.AddrPort, err error) {
	domain, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if client.Addr().Is6() {
		domain, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	message := unreachable(client, local, proxy.ReasonOf(err))
	if message == nil || client.Addr().Is6() != local.Addr().Is6() {
		return
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	unix.Bind(fd, sockaddr(local.Addr())) // a transparent proxy has not that address: then any will do
	unix.Sendto(fd, message, unix.MSG_DONTWAIT, sockaddr(client.Addr()))
}

func sockaddr(ip netip.Addr) unix.Sockaddr {
	if ip.Is4() {
		return &unix.SockaddrInet4{Addr: ip.As4()}
	}
	zone, _ := strconv.ParseUint(ip.Zone(), 10, 32) // as batchReader writes it
	return &unix.SockaddrInet6{Addr: ip.As16(), ZoneId: uint32(zone)}
}

// The codes of "destination unreachable", RFC 792, RFC 1812 section 5.2.7.1 and RFC 4443 section 3.1.
var unreachableCodes = map[proxy.Reason]struct{ v4, v6 byte }{
	proxy.NetUnreachable:  {0, 0},
	proxy.HostUnreachable: {1, 3},
	proxy.NoHost:          {1, 3},
	proxy.Refused:         {3, 4},
	proxy.Unsupported:     {3, 4}, // so that the client tries another way, and does not wait
	proxy.Denied:          {13, 1},
}

// unreachable returns the ICMP message about a datagram from client to local; nil where there is none for the reason.
// It quotes that datagram's headers, which is what its sender knows it by.
func unreachable(client, local netip.AddrPort, r proxy.Reason) []byte {
	code, ok := unreachableCodes[r]
	if !ok {
		return nil
	}
	const ttl, udpSize = 64, 8
	var b []byte
	if client.Addr().Is4() {
		b = append(b, 3, code.v4, 0, 0, 0, 0, 0, 0)
		b = append(b, 0x45, 0, 0, 20+udpSize, 0, 0, 0, 0, ttl, unix.IPPROTO_UDP, 0, 0)
	} else {
		b = append(b, 1, code.v6, 0, 0, 0, 0, 0, 0) // the kernel fills in the checksum
		b = append(b, 0x60, 0, 0, 0, 0, udpSize, unix.IPPROTO_UDP, ttl)
	}
	b = append(b, client.Addr().AsSlice()...)
	b = append(b, local.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, client.Port())
	b = binary.BigEndian.AppendUint16(b, local.Port())
	b = append(b, 0, udpSize, 0, 0)
	if client.Addr().Is4() {
		binary.BigEndian.PutUint16(b[8+10:], internetChecksum(b[8:8+20]))
		binary.BigEndian.PutUint16(b[2:], internetChecksum(b))
	}
	return b
}

// internetChecksum is that of RFC 1071, over an even number of bytes.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xFFFF {
		sum = sum>>16 + sum&0xFFFF
	}
	return ^uint16(sum)
}
