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
			if isTransparent(int(fd)) { // each of its sockets has the address that its client wanted
				l.local = netip.AddrPort{}
			}
		})
	}
	return l, nil
}

// isTransparent says whether a listener takes what is for other addresses, too. The two options are one for the kernel, but
// that of IPv4 can be asked for on sockets of either family.
func isTransparent(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT)
	return err == nil && on != 0
}

// AcceptSockets has the relay's loop accept the clients of ln, which SocketListener has made, so that Neither
// accepting nor the wait for it takes a goroutine. take is called with each client, and fail with each error of
// accept, from goroutines of the relay's, also at the same time; they must not block. After an
// error accepting pauses until Resume is called; it also begins only then. Where handled is false, which it is for any
// other listener, nothing was done.
func AcceptSockets(ln net.Listener, take func(*Socket), fail func(error)) (a *Acceptor, handled bool) {
	l, ok := ln.(*socketListener)
	if !ok {
		return nil, false
	}
	a = &Acceptor{ln: l, take: take, fail: fail, paused: true, fd: -1}
	l.raw.Control(func(fd uintptr) {
		if n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			a.fd = n
		}
	})
	if a.fd < 0 {
		return nil, false
	}
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

// Close stops accepting for good; it does not close the listener. When it has returned, Neither
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
