package relaytest

import (
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socketCaps is what any stream socket can carry.
const (
	socketCaps = HalfClose | Buffered | Watch
	tcpCaps    = socketCaps | Reset | Urgent | Vanish
)

// sockState says whether an error waits on the socket and whether both its directions have ended,
// and leaves it as it was: a read would take the error away.
func sockState(c syscall.RawConn) (isErr, isHup bool) {
	if c == nil {
		return false, false
	}
	err := c.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		unix.Poll(p, 0)
		isErr = p[0].Revents&unix.POLLERR != 0
		isHup = p[0].Revents&unix.POLLHUP != 0
	})
	return isErr || err != nil, isHup
}

// unsent returns how many bytes of the socket the other side's kernel has not acknowledged.
func unsent(c syscall.RawConn) (n int, err error) {
	if cerr := c.Control(func(fd uintptr) {
		n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	}); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// sendUrgent sends b, the last byte of which is urgent.
func sendUrgent(c syscall.RawConn, b []byte) (err error) {
	if werr := c.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), b, unix.MSG_OOB, nil)
		return err != unix.EAGAIN
	}); werr != nil {
		return werr
	}
	return err
}

func cpuTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func descriptors() int {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(names)
}

// setRepair makes the next close of the socket a silent one.
func setRepair(c syscall.RawConn) (err error) {
	if cerr := c.Control(func(fd uintptr) {
		err = os.NewSyscallError("setsockopt TCP_REPAIR", unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1))
	}); cerr != nil {
		return cerr
	}
	return err
}

// repairable says why setRepair does not work here.
func repairable() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return os.NewSyscallError("setsockopt TCP_REPAIR", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1))
}
