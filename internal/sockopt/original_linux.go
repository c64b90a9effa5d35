package sockopt

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

func setTransparent(fd int) error {
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	if family == unix.AF_INET6 {
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// originalDst reads SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, which have one number.
func originalDst(fd int, v6 bool) (netip.AddrPort, error) {
	level, sa := unix.SOL_IP, unix.RawSockaddrInet6{} // has room for both
	if v6 {
		level = unix.SOL_IPV6
	}
	size := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), unix.SO_ORIGINAL_DST,
		uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return netip.AddrPort{}, errno
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	if v6 {
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port), nil
	}
	v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa))
	return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port), nil
}

func askOriginalDsts(fd int, v6 bool) error {
	err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1) // a socket of IPv6 may carry IPv4, too
	if v6 {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
	}
	return err
}

func reuseAddress(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

// OriginalDstOf returns where a datagram with these control messages was sent to; the zero AddrPort where they do not tell.
func OriginalDstOf(oob []byte) netip.AddrPort {
	for m := range ControlMessages(oob) {
		switch {
		case m.Level == unix.SOL_IP && m.Type == unix.IP_ORIGDSTADDR && len(m.Data) >= unix.SizeofSockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[4:8])), binary.BigEndian.Uint16(m.Data[2:]))
		case m.Level == unix.SOL_IPV6 && m.Type == unix.IPV6_ORIGDSTADDR && len(m.Data) >= unix.SizeofSockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(m.Data[8:24])).Unmap(), binary.BigEndian.Uint16(m.Data[2:]))
		}
	}
	return netip.AddrPort{}
}
