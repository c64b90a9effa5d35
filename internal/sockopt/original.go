package sockopt

import (
	"fmt"
	"net/netip"
	"syscall"
)

// Transparent lets a listener take connections and datagrams that are for other addresses than this machine's, where a
// TPROXY rule sends them to it, and lets a socket be bound to such an address, to answer as it (IP_TRANSPARENT). It needs CAP_NET_ADMIN,
// else the error is [syscall.EPERM].
func Transparent(network, address string, c syscall.RawConn) error {
	return control(c, "make transparent", setTransparent)
}

// OriginalDst returns where an accepted TCP connection was going before a REDIRECT rule turned it to this machine
// (SO_ORIGINAL_DST). It asks the kernel's table of connections, which knows them by their local and remote addresses,
// of which local is one of IPv4 or of IPv6. A connection that the table does not know was not redirected: the error is [syscall.ENOENT].
func OriginalDst(c syscall.Conn, local netip.Addr) (dst netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("sockopt: original destination: %w", err)
	}
	err = control(raw, "original destination", func(fd int) (err error) {
		dst, err = originalDst(fd, local.Unmap().Is6())
		return err
	})
	return dst, err
}

// OriginalDsts has each datagram come with the address and port that it was sent to, for [OriginalDstOf]: with a transparent
// socket, those are not its own.
func OriginalDsts(network, _ string, c syscall.RawConn) error {
	return control(c, "ask for original destinations", func(fd int) error { return askOriginalDsts(fd, network != "udp4") })
}

// ReuseAddress lets other sockets have the same address, if they let it, too (SO_REUSEADDR).
func ReuseAddress(_, _ string, c syscall.RawConn) error {
	return control(c, "share the address", reuseAddress)
}
