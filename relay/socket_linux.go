package relay

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is a TCP or Unix stream socket that Go's poller does not know. It is a [net.Conn], and the first
// use as one makes it an ordinary conn; but where it is only handed on, from a [SocketListener] or
// [DialSocket] to Join or Start, the poller's work for it is saved, which for a short connection
// is about half of all that is done. Its methods may be called from any goroutine.
type Socket struct {
	mu        sync.Mutex
	fd        int      // -1: closed, given to a pair, or std's
	std       net.Conn // the ordinary conn that it has become
	tcp       bool
	keepalive bool  // the pair that takes it sees to keepalive
	home      *loop // that has accepted it; it is there for as long as the listener
	peer      netip.AddrPort
	local     netip.AddrPort // zero: not asked for yet

	loop  *loop // where it is registered, as slot; nil: nowhere
	slot  uint32
	seen  uint32                       // events so far; the loop's lock guards it
	told  func(l *loop, events uint32) // on the loop's goroutine; nil: nobody is interested
	given *kpair                       // the pair that has taken it
	side  Side                         // as which
}

var _ net.Conn = (*Socket)(nil)
var _ HalfCloser = (*Socket)(nil)
var _ Aborter = (*Socket)(nil)

// event keeps what is told while nobody has taken the socket.
func (s *Socket) event(l *loop, _ Side, events uint32) {
	l.mu.Lock()
	s.seen |= events
	told, p := s.told, s.given
	l.mu.Unlock()
	switch {
	case p != nil: // it was given away in this very turn, before its event had its turn
		p.event(l, s.side, events)
	case told != nil:
		told(l, events)
	}
}

// register has a loop tell told of all events; home is the loop, or nil for any.
func (s *Socket) register(home *loop, told func(l *loop, events uint32)) (*loop, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 || s.loop != nil {
		return nil, net.ErrClosed
	}
	err := withLoop(home, func(l *loop) error {
		s.told = told
		index, err := l.register(s.fd, pairEvents, s, A)
		if err != nil {
			return err
		}
		s.loop, s.slot = l, index
		return nil
	})
	return s.loop, err
}

// leave takes the socket out of its loop, if it is in one. s.mu is held.
func (s *Socket) leave() {
	if l := s.loop; l != nil {
		l.mu.Lock()
		s.leaveLocked()
		l.mu.Unlock()
	}
}

// leaveLocked is leave with the loop's lock held.
func (s *Socket) leaveLocked() {
	unix.EpollCtl(s.loop.epfd, unix.EPOLL_CTL_DEL, s.fd, nil)
	s.loop.unregister(s.slot)
	s.loop, s.told, s.seen = nil, nil, 0
}

// below lets the socket be watched.
func (s *Socket) below() below {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.std != nil {
		return belowOf(s.std)
	}
	return below{raw: rawSocket{s}, tcp: s.tcp}
}

// SyscallConn returns the socket's descriptor, to get and set options of it by Control; the socket stays what it is.
func (s *Socket) SyscallConn() (syscall.RawConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.std != nil {
		return s.std.(syscall.Conn).SyscallConn()
	}
	return rawSocket{s}, nil
}

// rawSocket is a Socket's descriptor as a syscall.RawConn.
type rawSocket struct{ s *Socket }

// Control calls f with the descriptor, which is valid until f returns.
func (r rawSocket) Control(f func(fd uintptr)) error {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.s.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(r.s.fd))
	return nil
}

func (rawSocket) Read(func(fd uintptr) bool) error  { return errors.ErrUnsupported }
func (rawSocket) Write(func(fd uintptr) bool) error { return errors.ErrUnsupported }

func (s *Socket) isConn() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.std != nil
}

// conn makes the socket an ordinary conn.
func (s *Socket) conn() (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.std != nil {
		return s.std, nil
	}
	if s.fd < 0 {
		return nil, net.ErrClosed
	}
	s.leave()
	if s.tcp && s.keepalive {
		setKeepAlive(s.fd)
	}
	f := os.NewFile(uintptr(s.fd), "socket")
	s.fd = -1
	defer f.Close()
	std, err := net.FileConn(f)
	if err != nil { // no descriptors: closed it is, but not cleanly
		unix.SetsockoptLinger(int(f.Fd()), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		return nil, err
	}
	s.std = std
	return std, nil
}

// Read reads as an ordinary conn.
func (s *Socket) Read(b []byte) (int, error) {
	c, err := s.conn()
	if err != nil {
		return 0, err
	}
	return c.Read(b)
}

// Write writes as an ordinary conn.
func (s *Socket) Write(b []byte) (int, error) {
	c, err := s.conn()
	if err != nil {
		return 0, err
	}
	return c.Write(b)
}

// SetDeadline sets both deadlines of an ordinary conn.
func (s *Socket) SetDeadline(t time.Time) error {
	c, err := s.conn()
	if err != nil {
		return err
	}
	return c.SetDeadline(t)
}

// SetReadDeadline sets the deadline of an ordinary conn's Read.
func (s *Socket) SetReadDeadline(t time.Time) error {
	c, err := s.conn()
	if err != nil {
		return err
	}
	return c.SetReadDeadline(t)
}

// SetWriteDeadline sets the deadline of an ordinary conn's Write.
func (s *Socket) SetWriteDeadline(t time.Time) error {
	c, err := s.conn()
	if err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// Close closes the socket.
func (s *Socket) Close() error { return s.close(false) }

// Abort closes the socket with a reset; a Unix socket, which has none, just so.
func (s *Socket) Abort() error { return s.close(true) }

func (s *Socket) close(abort bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.std != nil && abort:
		return Abort(s.std)
	case s.std != nil:
		return s.std.Close()
	case s.fd < 0:
		return net.ErrClosed
	}
	s.leave()
	if abort {
		rawAbort(s.fd)
	} else {
		rawClose(s.fd)
	}
	s.fd = -1
	return nil
}

// CloseWrite half-closes the socket.
func (s *Socket) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.std != nil:
		return s.std.(HalfCloser).CloseWrite()
	case s.fd < 0:
		return net.ErrClosed
	}
	return rawShutdown(s.fd)
}

// RemoteAddr returns the peer's address: a *net.TCPAddr, or a *net.UnixAddr without a name.
func (s *Socket) RemoteAddr() net.Addr { return s.addr(s.peer) }

// LocalAddr returns our own address, in the form of RemoteAddr.
func (s *Socket) LocalAddr() net.Addr {
	s.mu.Lock()
	if std := s.std; std != nil {
		s.mu.Unlock()
		return std.LocalAddr()
	}
	if s.tcp && !s.local.IsValid() && s.fd >= 0 {
		if sa, err := syscall.Getsockname(s.fd); err == nil {
			s.local = addrPortOf(sa)
		}
	}
	s.mu.Unlock()
	return s.addr(s.local)
}

func (s *Socket) addr(a netip.AddrPort) net.Addr {
	if !s.tcp {
		return &net.UnixAddr{Net: "unix"}
	}
	return net.TCPAddrFromAddrPort(a)
}

func addrPortOf(sa syscall.Sockaddr) netip.AddrPort {
	switch t := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(t.Addr), uint16(t.Port))
	case *syscall.SockaddrInet6:
		ip := netip.AddrFrom16(t.Addr).Unmap()
		if t.ZoneId != 0 && ip.Is6() {
			if i, err := net.InterfaceByIndex(int(t.ZoneId)); err == nil {
				ip = ip.WithZone(i.Name)
			}
		}
		return netip.AddrPortFrom(ip, uint16(t.Port))
	}
	return netip.AddrPort{}
}

// setKeepAlive has the kernel ask after a peer that has been silent for 10 to 15 s, and give it up a minute after its last word.
//
// Probes of sockets that fell silent together are sent together, as the kernel's timers are exact to a quarter of a second (and
// beyond 16 s only to 2 s), and of thousands at a time most are lost in a queue: that of loopback takes 1000. So sockets differ in
// when they ask, by their descriptor, and ask again soon, at times that differ, too. A process that has many asks after
// other machines only: a peer on this one does not vanish without a word.
func setKeepAlive(fd int) {
	if fd >= manySockets {
		if sa, err := unix.Getpeername(fd); err == nil && isLoopback(sa) {
			return
		}
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 10+fd%6)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 3+2*(fd/6%3))
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 8)
}

// manySockets is the descriptor from which on a process has many.
const manySockets = 1000

func isLoopback(sa unix.Sockaddr) bool {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(a.Addr).IsLoopback()
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(a.Addr).Unmap().IsLoopback()
	}
	return false
}

// ordinary returns c as a conn of Go's net package where it is a Socket.
func ordinary(c io.ReadWriteCloser) io.ReadWriteCloser {
	if s, ok := c.(*Socket); ok {
		if std, err := s.conn(); err == nil {
			return std
		}
	}
	return c
}

// become returns c, or the conn of Go's net package that it has become if it is a Socket that was used as one: that can
// be carried by the kernel, too.
func become(c io.ReadWriteCloser) io.ReadWriteCloser {
	if s, ok := c.(*Socket); ok && s.isConn() {
		return s.std
	}
	return c
}

// keepAlive turns the side's keepalive on, if that was left to the pair.
func (k *kside) keepAlive() {
	if k.keepalive {
		k.keepalive = false
		setKeepAlive(int(k.fd))
	}
}
