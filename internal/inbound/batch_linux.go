package inbound

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// batchMost is how many datagrams are read at a time.
const batchMost = 32

// batchReader reads the datagrams of a socket, as many at a time as are there (recvmmsg).
type batchReader struct {
	raw     syscall.RawConn
	receive func(fd uintptr) bool // is tryReceive
	n       int
	errno   syscall.Errno

	messages [batchMost]struct {
		header unix.Msghdr
		n      uint32
	}
	slots [batchMost]struct {
		iov  unix.Iovec
		from unix.RawSockaddrAny
		oob  [128]byte
	}
	data []byte // maxDatagram for each; pages that no datagram has needed are not there
}

const maxDatagram = 64 << 10

func newBatchReader(c *net.UDPConn) (*batchReader, error) {
	r := &batchReader{data: make([]byte, batchMost*maxDatagram)}
	r.receive = r.tryReceive
	for i := range r.messages {
		s, h := &r.slots[i], &r.messages[i].header
		s.iov.Base = &r.data[i*maxDatagram]
		s.iov.SetLen(maxDatagram)
		h.Iov, h.Name, h.Control = &s.iov, (*byte)(unsafe.Pointer(&s.from)), &s.oob[0]
		h.SetIovlen(1)
	}
	var err error
	r.raw, err = c.SyscallConn()
	return r, err
}

// read waits for a datagram, and returns how many have come.
func (r *batchReader) read() (int, error) {
	if err := r.raw.Read(r.receive); err != nil {
		return 0, err
	}
	if r.errno != 0 {
		return 0, r.errno
	}
	return r.n, nil
}

func (r *batchReader) tryReceive(fd uintptr) bool {
	for i := range r.messages {
		h := &r.messages[i].header
		h.Namelen = unix.SizeofSockaddrAny
		h.SetControllen(len(r.slots[i].oob))
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.messages[0])), batchMost, unix.MSG_DONTWAIT, 0, 0)
		r.n, r.errno = int(n), errno
		if errno != unix.EINTR {
			return errno != unix.EAGAIN
		}
	}
}

// datagram returns the ith of those that were read last, with its control messages and its sender. It is there until the next read.
func (r *batchReader) datagram(i int) (data, oob []byte, from netip.AddrPort) {
	m, s := &r.messages[i], &r.slots[i]
	data = r.data[i*maxDatagram:][:m.n]
	oob = s.oob[:m.header.Controllen]
	var port [2]byte
	switch s.from.Addr.Family {
	case unix.AF_INET:
		a := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.from))
		binary.NativeEndian.PutUint16(port[:], a.Port)
		from = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), binary.BigEndian.Uint16(port[:]))
	case unix.AF_INET6:
		a := (*unix.RawSockaddrInet6)(unsafe.Pointer(&s.from))
		binary.NativeEndian.PutUint16(port[:], a.Port)
		ip := netip.AddrFrom16(a.Addr).Unmap()
		if a.Scope_id != 0 && ip.Is6() {
			ip = ip.WithZone(strconv.FormatUint(uint64(a.Scope_id), 10))
		}
		from = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port[:]))
	}
	return data, oob, from
}

// lost returns how many datagrams the kernel has dropped since the socket was made, mostly for want of room there.
func (r *batchReader) lost() (n uint32) {
	var info [skMemInfoDrops + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	r.raw.Control(func(fd uintptr) {
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno == 0 {
			n = info[skMemInfoDrops]
		}
	})
	return n
}

// skMemInfoDrops is SK_MEMINFO_DROPS: where the count stands in what SO_MEMINFO tells (Linux 4.12).
const skMemInfoDrops = 8
