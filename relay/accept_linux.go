package relay

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketListener accepts Sockets. It waits through Go's poller, by a descriptor of its own.
type socketListener struct {
	net.Listener
	file  *os.File
	raw   syscall.RawConn
	tcp   bool
	local netip.AddrPort // of all its sockets; zero where it listens at all addresses
}

// Accept waits for the next client. Its errors are those of a net.Listener.
func (l *socketListener) Accept() (net.Conn, error) {
	var (
		s   *Socket
		err error
	)
	rerr := l.raw.Read(func(fd uintptr) bool {
		nfd, sa, aerr := syscall.Accept4(int(fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if aerr == unix.EAGAIN {
			return false
		}
		if aerr != nil {
			err = os.NewSyscallError("accept4", aerr)
			return true
		}
		s = &Socket{fd: nfd, tcp: l.tcp, local: l.local, peer: addrPortOf(sa)}
		return true
	})
	switch {
	case rerr != nil: // the file was closed
		err = net.ErrClosed
	case err == nil:
		return s, nil
	}
	return nil, &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
}

// Close closes the listener.
func (l *socketListener) Close() error {
	return errors.Join(l.Listener.Close(), l.file.Close())
}

// SocketListener returns ln as a listener whose conns are Sockets. Their keepalive is on and finds a vanished
// machine within about a minute. On systems where a Socket has no use, and for listeners other than
// *net.TCPListener and *net.UnixListener, it is ln itself. Closing the result closes ln.
func SocketListener(ln net.Listener) (net.Listener, error) {
	l := &socketListener{Listener: ln}
	var err error
	switch t := ln.(type) {
	case *net.TCPListener:
		l.tcp = true
		if ap := t.Addr().(*net.TCPAddr).AddrPort(); !ap.Addr().IsUnspecified() {
			l.local = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
		l.file, err = t.File()
	case *net.UnixListener:
		l.file, err = t.File()
	default:
		return ln, nil
	}
	if err != nil {
		return nil, err
	}
	if l.raw, err = l.file.SyscallConn(); err != nil {
		l.file.Close()
		return nil, err
	}
	if l.tcp {
		l.raw.Control(func(fd uintptr) { // inherited by the sockets accepted
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			setKeepAlive(int(fd))
		})
	}
	return l, nil
}
