package relay

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpReader reads the datagrams of a UDP socket, and the kernel's queue of what it has heard about those that were sent.
type udpReader struct {
	conn    *UDPConn
	raw     syscall.RawConn
	receive func(fd uintptr) bool // is tryReceive
	into    *Packet
	from    unix.RawSockaddrAny
	waited  bool // the socket has become readable since ReadPacket was called
	err     error
}

func (r *udpReader) init(c *UDPConn) {
	r.conn, r.receive = c, r.tryReceive
	r.raw, r.err = c.conn.SyscallConn()
	if r.err != nil {
		return
	}
	r.raw.Control(func(fd uintptr) { // a socket of IPv6 may carry IPv4 too
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
	})
}

// ReadPacket implements PacketConn.
func (c *UDPConn) ReadPacket(p *Packet) error {
	r := &c.reader
	if r.raw == nil {
		return r.err
	}
	r.into, r.waited, r.err = p, false, nil
	err := r.raw.Read(r.receive)
	r.into = nil
	if r.err != nil {
		return r.err
	}
	return err
}

// tryReceive receives a datagram or an error, and returns false if there is neither.
func (r *udpReader) tryReceive(fd uintptr) bool {
	for {
		b := r.into.Grow(packetLarge)
		n, errno := recvfrom(fd, b, &r.from)
		if errno == 0 {
			r.into.Data, r.into.Endpoint = b[:n], sockaddrEndpoint(&r.from)
			return true
		}
		r.into.Free()
		switch {
		case errno == unix.EAGAIN && (r.waited || r.conn.failed.Load() && r.conn.failed.Swap(false)):
			// A write may have taken the error that we were woken for; what it was about is still in the queue.
			r.waited = true
			return r.queuedError(fd)
		case errno == unix.EAGAIN:
			r.waited = true
			return false
		case !isHeard(errno):
			r.err = errno
			return true
		case r.queuedError(fd):
			return true
		} // or else it was told before: the kernel queues an error first, and then sets it
	}
}

// isHeard says whether errno can be what an ICMP message has said. Such an error is there once.
func isHeard(errno syscall.Errno) bool {
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET, unix.EACCES, unix.EPROTO,
		unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EMSGSIZE:
		return true
	}
	return false
}

// ReadMore implements BatchReader. It looks only where ReadPacket has not waited: then there is often more.
func (c *UDPConn) ReadMore(ps []Packet) (n int) {
	r := &c.reader
	if r.waited || r.raw == nil {
		return 0
	}
	large := largePackets.Get().(*[packetLarge]byte)
	defer largePackets.Put(large)
	r.raw.Read(func(fd uintptr) bool {
		for ; n < len(ps); n++ {
			size, errno := recvfrom(fd, large[:], &r.from)
			if errno != 0 {
				if errno != unix.EAGAIN {
					c.failed.Store(true) // ReadPacket finds it in the queue
				}
				break
			}
			copy(ps[n].Grow(size), large[:size])
			ps[n].Endpoint = sockaddrEndpoint(&r.from)
		}
		return true
	})
	return n
}

// queuedError takes the first error out of the kernel's queue that an ICMP message has brought, and returns false if there is none.
func (r *udpReader) queuedError(fd uintptr) bool {
	oob := make([]byte, 512)
	for {
		_, oobn, _, from, err := unix.Recvmsg(int(fd), nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return false
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			continue
		}
		for _, m := range messages {
			isError := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR ||
				m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
			if !isError || len(m.Data) < sizeofExtendedErr {
				continue
			}
			errno, origin := syscall.Errno(binary.NativeEndian.Uint32(m.Data)), m.Data[4]
			// Errors of this machine came back from the write. Of a path with a smaller MTU the kernel takes note itself.
			if origin != unix.SO_EE_ORIGIN_ICMP && origin != unix.SO_EE_ORIGIN_ICMP6 || errno == unix.EMSGSIZE {
				continue
			}
			r.err = &UnreachableError{To: endpointOf(from), Err: errno}
			return true
		}
	}
}

// sizeofExtendedErr is that of struct sock_extended_err: errno, origin, type, code, padding, info, data.
const sizeofExtendedErr = 16

func recvfrom(fd uintptr, b []byte, from *unix.RawSockaddrAny) (int, syscall.Errno) {
	for {
		size := uint32(unix.SizeofSockaddrAny)
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
			unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(from)), uintptr(unsafe.Pointer(&size)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func sockaddrEndpoint(sa *unix.RawSockaddrAny) Endpoint {
	switch sa.Addr.Family {
	case unix.AF_INET:
		a := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return Endpoint{IP: netip.AddrFrom4(a.Addr), Port: networkOrder(a.Port)}
	case unix.AF_INET6:
		a := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return Endpoint{IP: zoned(netip.AddrFrom16(a.Addr), a.Scope_id), Port: networkOrder(a.Port)}
	}
	return Endpoint{}
}

func endpointOf(sa unix.Sockaddr) Endpoint {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return Endpoint{IP: netip.AddrFrom4(sa.Addr), Port: uint16(sa.Port)}
	case *unix.SockaddrInet6:
		return Endpoint{IP: zoned(netip.AddrFrom16(sa.Addr), sa.ZoneId), Port: uint16(sa.Port)}
	}
	return Endpoint{}
}

func zoned(ip netip.Addr, zone uint32) netip.Addr {
	if ip = ip.Unmap(); zone != 0 && ip.Is6() {
		ip = ip.WithZone(strconv.FormatUint(uint64(zone), 10))
	}
	return ip
}

// networkOrder turns a port as the kernel has it into a number.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}
