package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// poller is an epoll instance for one thread. The ends of the load use it in place of goroutines because they
// share the cores with the relay: the cheaper the ends, the more a difference between relays shows.
type poller struct {
	fd     int
	events [256]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &poller{fd: fd}, err
}

func (p *poller) add(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (p *poller) change(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// wait returns the next events, or none after 20 ms. It keeps its processor while it sleeps, as a C program
// does: giving it up and taking it back costs an end as much as the message itself. So the garbage
// collector waits for it, which is why the time is short and the loops do not allocate.
func (p *poller) wait() []unix.EpollEvent {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd),
		uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), 20, 0, 0)
	if errno != 0 {
		return nil
	}
	return p.events[:n]
}
