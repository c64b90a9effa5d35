package relay

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketListener accepts Sockets. Its descriptor is not in Go's poller, which would wake a thread for each client that a loop
// accepts, and for nothing.
type socketListener struct {
	net.Listener // of TCP: closed already, and knows its address. Of Unix: removes its path when it is closed
	fd           int
	tcp          bool
	local        netip.AddrPort // of all its sockets; zero where it listens at all addresses

	mu     sync.Mutex
	waiter *os.File // the same socket in Go's poller, since the first Accept
	raw    syscall.RawConn
	closed bool
}

// Accept waits for the next client. Its errors are those of a net.Listener.
func (l *socketListener) Accept() (net.Conn, error) {
	raw, err := l.wait()
	if err != nil {
		return nil, l.failed(err)
	}
	var s *Socket
	rerr := raw.Read(func(fd uintptr) bool {
		s, err = l.acceptFrom(int(fd))
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

// wait returns the socket as Go's poller knows it.
func (l *socketListener) wait() (syscall.RawConn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiter == nil {
		fd, err := l.dup()
		if err != nil {
			return nil, err
		}
		l.waiter = os.NewFile(uintptr(fd), "listener")
		if l.raw, err = l.waiter.SyscallConn(); err != nil {
			return nil, err
		}
	}
	return l.raw, nil
}

// dup returns another descriptor of the socket. The lock is held.
func (l *socketListener) dup() (int, error) {
	if l.closed {
		return -1, net.ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(l.fd), unix.F_DUPFD_CLOEXEC, 0)
	return fd, os.NewSyscallError("fcntl", err)
}

// acceptFrom accepts a client that waits. Its error is an errno.
func (l *socketListener) acceptFrom(fd int) (*Socket, error) {
	nfd, sa, err := syscall.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &Socket{fd: nfd, tcp: l.tcp, keepalive: l.tcp, local: l.local, peer: addrPortOf(sa)}, nil
}

func (l *socketListener) failed(err error) error {
	return &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: err}
}

// Close closes the listener.
func (l *socketListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return l.failed(net.ErrClosed)
	}
	l.closed = true
	rawClose(l.fd)
	if l.waiter != nil {
		l.waiter.Close()
	}
	if l.tcp {
		return nil
	}
	return l.Listener.Close()
}

// SocketListener returns ln as a listener whose conns are Sockets. Their keepalive is on and finds a vanished
// machine within about a minute. On systems where a Socket has no use, and for listeners other than
// *net.TCPListener and *net.UnixListener, it is ln itself. It takes ln over, even if it fails: ln is not to be used any
// more, and closing the result ends listening.
func SocketListener(ln net.Listener) (net.Listener, error) {
	l := &socketListener{Listener: ln}
	switch t := ln.(type) {
	case *net.TCPListener:
		l.tcp = true
		if ap := t.Addr().(*net.TCPAddr).AddrPort(); !ap.Addr().IsUnspecified() {
			l.local = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
	case *net.UnixListener:
	default:
		return ln, nil
	}
	if err := l.takeOver(); err != nil {
		ln.Close()
		return nil, fmt.Errorf("relay: take a listener over: %w", err)
	}
	return l, nil
}

func (l *socketListener) takeOver() error {
	raw, err := l.Listener.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var duped error
	err = raw.Control(func(fd uintptr) {
		if l.fd, duped = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); duped != nil || !l.tcp {
			return
		}
		unix.SetsockoptInt(l.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // inherited by the sockets accepted
		if isTransparent(l.fd) {                                        // each of its sockets has the address that its client wanted
			l.local = netip.AddrPort{}
		}
	})
	if err = cmp.Or(err, duped); err == nil && l.tcp {
		l.Listener.Close() // the socket lives on by its other descriptor
	}
	return err
}

// isTransparent says whether a listener takes what is for other addresses, too. The two options are one for the kernel, but
// that of IPv4 can be asked for on sockets of either family.
func isTransparent(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT)
	return err == nil && on != 0
}

// AcceptSockets has the relay's loop accept the clients of ln, which SocketListener has made, so that neither
// accepting nor the wait for it takes a goroutine. take is called with each client, and fail with each error of
// accept, from goroutines of the relay's, also at the same time; they must not block. After an
// error accepting pauses until Resume is called; it also begins only then. Where handled is false, which it is for any
// other listener, nothing was done.
func AcceptSockets(ln net.Listener, take func(*Socket), fail func(error)) (a *Acceptor, handled bool) {
	l, ok := ln.(*socketListener)
	if !ok {
		return nil, false
	}
	a = &Acceptor{ln: l, take: take, fail: fail, paused: true}
	l.mu.Lock()
	fd, err := l.dup()
	l.mu.Unlock()
	if err != nil {
		return nil, false
	}
	a.fd = fd
	if err := allLoops(a.join); err != nil {
		a.Close()
		return nil, false
	}
	return a, true
}

// Acceptor accepts Sockets, by every loop: a client stays with the loop that has accepted it. Its methods may be
// called from any goroutine, and from take and fail.
type Acceptor struct {
	ln    *socketListener
	take  func(*Socket)
	fail  func(error)
	fd    int // its own, so that nobody closes it
	seats []seat

	busy   sync.RWMutex // held for reading while take or fail runs
	mu     sync.Mutex
	paused bool
	closed bool
}

// seat is an acceptor's place in a loop.
type seat struct {
	loop *loop
	slot uint32
}

// join gives the acceptor a seat in l, whose lock is held.
func (a *Acceptor) join(l *loop) error {
	a.seats = append(a.seats, seat{l, l.reserve(a, A)})
	return nil
}

// event accepts one client. The listener is registered level-triggered: if there are more, that is told again, after what
// else has happened meanwhile, and to whichever loop is free.
func (a *Acceptor) event(l *loop, _ Side, _ uint32) {
	a.busy.RLock()
	defer a.busy.RUnlock()
	a.mu.Lock()
	off := a.paused || a.closed
	a.mu.Unlock()
	if off {
		return
	}
	s, err := a.ln.acceptFrom(a.fd)
	switch {
	case err == nil:
		s.home = l
		a.take(s)
	case err == syscall.EAGAIN: // another loop was faster
	default:
		a.Pause()
		a.fail(a.ln.failed(os.NewSyscallError("accept4", err)))
	}
}

// Pause stops accepting until Resume: clients wait in the kernel's queue.
func (a *Acceptor) Pause() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.paused && !a.closed {
		a.paused = true
		a.disarm()
	}
}

// Resume begins, or goes on after a pause.
func (a *Acceptor) Resume() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.paused || a.closed {
		return
	}
	a.paused = false
	for _, s := range a.seats {
		s.loop.mu.Lock()
		s.loop.add(a.fd, acceptEvents, s.slot)
		s.loop.mu.Unlock()
	}
}

func (a *Acceptor) disarm() {
	for _, s := range a.seats {
		unix.EpollCtl(s.loop.epfd, unix.EPOLL_CTL_DEL, a.fd, nil)
	}
}

// Close stops accepting for good; it does not close the listener. When it has returned, neither
// take nor fail runs or will be called; so it must not be called from them.
func (a *Acceptor) Close() {
	a.busy.Lock()
	defer a.busy.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.closed = true
	a.disarm()
	rawClose(a.fd)
	for _, s := range a.seats {
		s.loop.mu.Lock()
		s.loop.unregister(s.slot)
		s.loop.mu.Unlock()
	}
}
