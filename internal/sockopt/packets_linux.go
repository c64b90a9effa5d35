package sockopt

import (
	"iter"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PacketInfo has each datagram come with the address that it was sent to, for [PacketInfoOf]. A system that cannot
// do it does nothing.
func PacketInfo(network, _ string, c syscall.RawConn) error {
	return control(c, "ask for packet info", func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		if network != "udp4" {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
		return err
	})
}

// PacketInfoOf returns the address that a datagram with these control messages was sent to; the zero Addr where they do not tell.
// It is one of this machine's.
func PacketInfoOf(oob []byte) netip.Addr {
	for m := range ControlMessages(oob) {
		switch {
		case m.Level == unix.IPPROTO_IP && m.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(m.Data[4:8])) // ipi_spec_dst: ours, also where the destination was a broadcast
		case m.Level == unix.IPPROTO_IPV6 && m.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(m.Data[:16])).Unmap()
		}
	}
	return netip.Addr{}
}

// AppendPacketInfo appends the control message that has a datagram sent from ip, by a socket of IPv6 or one of IPv4 only.
func AppendPacketInfo(b []byte, ip netip.Addr, isIPv6 bool) []byte {
	level, typ, size := unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo
	if isIPv6 {
		level, typ, size = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo
	}
	at := len(b)
	b = append(b, make([]byte, unix.CmsgSpace(size))...)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[at]))
	h.Level, h.Type = int32(level), int32(typ)
	h.SetLen(unix.CmsgLen(size))
	data := b[at+unix.CmsgLen(0):]
	if isIPv6 {
		a := ip.As16()
		copy(data, a[:])
	} else {
		a := ip.As4()
		copy(data[4:], a[:])
	}
	return b
}

// ControlMessage is what the kernel says about a datagram beside its bytes.
type ControlMessage struct {
	Level, Type int
	Data        []byte
}

// ControlMessages returns each of a datagram's control messages, up to the first that is malformed.
func ControlMessages(oob []byte) iter.Seq[ControlMessage] {
	const header = unix.SizeofCmsghdr
	return func(yield func(ControlMessage) bool) {
		for len(oob) >= header {
			h := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(oob)))
			size := int(h.Len)
			if size < header || size > len(oob) || !yield(ControlMessage{int(h.Level), int(h.Type), oob[header:size]}) {
				return
			}
			oob = oob[min(len(oob), unix.CmsgSpace(size-header)):]
		}
	}
}

// ReceiveBuffer asks for room for n bytes of datagrams that nobody has read yet; the kernel may give less.
func ReceiveBuffer(n int) Control {
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, "ask for a receive buffer", func(fd int) error {
			if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n) != nil { // needs CAP_NET_ADMIN
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, n)
			}
			return nil
		})
	}
}
