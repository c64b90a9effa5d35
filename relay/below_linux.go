package relay

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// canTryRead says that readSocket works here: the netpoller can be waited in without a buffer.
const canTryRead = true

// below is a stream socket of the kernel below a conn that Go's net package still owns.
type below struct {
	raw syscall.RawConn
	tcp bool
}

func newBelow(c syscall.Conn, tcp bool) below {
	raw, err := c.SyscallConn()
	if err != nil {
		return below{}
	}
	return below{raw: raw, tcp: tcp}
}

// unsent returns how many bytes the kernel holds that the peer has not acknowledged (for a Unix
// below: not read).
func (s below) unsent() (n int, ok bool) {
	if s.raw == nil {
		return 0, false
	}
	err := s.raw.Control(func(fd uintptr) { n, ok = unsent(int(fd)) })
	return n, ok && err == nil
}

// dead says that a TCP socket is no longer connected in any way. Before our own FIN that can only
// be by an error, a reset or a timeout.
func (s below) dead() (dead bool) {
	if s.raw == nil || !s.tcp {
		return false
	}
	s.raw.Control(func(fd uintptr) { dead = tcpState(int(fd)) == unix.BPF_TCP_CLOSE })
	return dead
}

// failure takes the socket's pending error.
func (s below) failure() error {
	err := errReset
	if s.raw != nil {
		s.raw.Control(func(fd uintptr) { err = failureOf(int(fd), s.tcp) })
	}
	return err
}

func unsent(fd int) (n int, ok bool) {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	return n, err == nil
}

func tcpState(fd int) uint8 {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return info.State
}

// tryRead is called with the socket's descriptor, at first and whenever it may be readable; false
// is to wait.
func (rd *reader) tryRead(fd uintptr) bool {
	for {
		n, err := syscall.Read(int(fd), rd.cut(rd.takeLarge()))
		switch err {
		case nil:
			rd.n = n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			rd.releaseLarge()
			return false
		default:
			rd.err = err
		}
		return true
	}
}
