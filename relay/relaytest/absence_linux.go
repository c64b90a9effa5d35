package relaytest

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// setBacklog sets how many connections wait for an accept, and makes a listener listen again that
// does not. With 0 there is room for one; the SYNs of others are dropped.
func setBacklog(ln *net.TCPListener, n int) error {
	return controlListener(ln, func(fd int) error { return os.NewSyscallError("listen", unix.Listen(fd, n)) })
}

// refuse makes the listener refuse connections, until the next setBacklog.
func refuse(ln *net.TCPListener) error {
	return controlListener(ln, func(fd int) error {
		addr, err := unix.Getsockname(fd)
		if err != nil {
			return os.NewSyscallError("getsockname", err)
		}
		if err := unix.Shutdown(fd, unix.SHUT_RD); err != nil {
			return os.NewSyscallError("shutdown", err)
		}
		unix.Bind(fd, addr) // it has kept its port if that was chosen, not if the kernel chose it
		return nil
	})
}

func controlListener(ln *net.TCPListener, f func(fd int) error) error {
	c, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// absences says why origins cannot be made absent here.
func absences() string { return "" }
