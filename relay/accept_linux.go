package relay

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
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
		s, err = l.accept(int(fd))
		return err != syscall.EAGAIN
	})
	switch {
	case rerr != nil: // the file was closed
		return nil, l.failed(net.ErrClosed)
	case err != nil:
		return nil, l.failed(os.NewSyscallError("accept4", err))
	}
	return s, nil
}

// accept accepts a client that waits. Its error is an errno.
func (l *socketListener) accept(fd int) (*Socket, error) {
	nfd, sa, err := syscall.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &Socket{fd: nfd, tcp: l.tcp, local: l.local, peer: addrPortOf(sa)}, nil
}

func (l *socketListener) failed(err error) error {
	return &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
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

// AcceptSockets has the relay's loop accept the clients of ln, which SocketListener has made, so that neither
// accepting nor the wait for it takes a goroutine. take is called with each client, and fail with
// each error of accept; both are called one after the other, from a goroutine of the relay's, and must not block. After an
// error accepting pauses until Resume is called; it also begins only then. Where handled is false, which it is for any
// other listener, nothing was done.
func AcceptSockets(ln net.Listener, take func(*Socket), fail func(error)) (a *Acceptor, handled bool) {
	l, ok := ln.(*socketListener)
	if !ok {
		return nil, false
	}
	a = &Acceptor{ln: l, take: take, fail: fail, paused: true}
	err := l.raw.Control(func(fd uintptr) {
		a.fd = int(fd)
		handled = withLoop(nil, func(lo *loop) (err error) {
			a.loop = lo
			a.slot, err = lo.register(a.fd, 0, a, A)
			return err
		}) == nil
	})
	return a, handled && err == nil
}

// Acceptor accepts Sockets. Its methods may be called from any goroutine, and from take and fail.
type Acceptor struct {
	ln   *socketListener
	take func(*Socket)
	fail func(error)
	fd   int
	loop *loop
	slot uint32

	mu     sync.Mutex // held while take or fail runs
	ctl    sync.Mutex
	paused bool // guarded by ctl, as is closed
	closed bool
}

// event accepts one client. The listener is registered level-triggered: if there are more, that is told again, after what
// else has happened meanwhile.
func (a *Acceptor) event(*loop, Side, uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ctl.Lock()
	off := a.paused || a.closed
	a.ctl.Unlock()
	if off {
		return
	}
	s, err := a.ln.accept(a.fd)
	switch {
	case err == nil:
		a.take(s)
	case err == syscall.EAGAIN:
	default:
		a.Pause()
		a.fail(a.ln.failed(os.NewSyscallError("accept4", err)))
	}
}

// Pause stops accepting until Resume: clients wait in the kernel's queue.
func (a *Acceptor) Pause() { a.arm(true, 0) }

// Resume goes on after a pause.
func (a *Acceptor) Resume() { a.arm(false, unix.EPOLLIN) }

func (a *Acceptor) arm(paused bool, events uint32) {
	a.ctl.Lock()
	defer a.ctl.Unlock()
	if a.closed || a.paused == paused {
		return
	}
	a.paused = paused
	a.loop.mu.Lock()
	defer a.loop.mu.Unlock()
	ev := unix.EpollEvent{Events: events, Fd: int32(a.slot), Pad: int32(a.loop.slots[a.slot].gen)}
	unix.EpollCtl(a.loop.epfd, unix.EPOLL_CTL_MOD, a.fd, &ev)
}

// Close stops accepting for good; it does not close the listener. When it has returned, neither take nor fail runs or
// will be called; so it must not be called from them.
func (a *Acceptor) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ctl.Lock()
	defer a.ctl.Unlock()
	if a.closed {
		return
	}
	a.closed = true
	a.ln.raw.Control(func(fd uintptr) { unix.EpollCtl(a.loop.epfd, unix.EPOLL_CTL_DEL, int(fd), nil) })
	a.loop.mu.Lock()
	defer a.loop.mu.Unlock()
	a.loop.unregister(a.slot)
}
