package relay

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DialSocket connects to a TCP address for a client that waits for it, without a goroutine. done is called once, with the socket or an
// error, from a goroutine of the relay's or before DialSocket returns; it must not block. handled is
// false if client is not a [Socket] fit for it: then nothing was done, and done is not called.
//
// The client's reset cancels the dial: the error is then both [context.Canceled] and ECONNRESET. So does calling cancel, with its cause,
// which does nothing once done was called. After a timeout the error is [context.DeadlineExceeded]; 0 is none. control sets options of
// the new socket before it connects, as that of a net.Dialer does; nil for none.
func DialSocket(client net.Conn, to netip.AddrPort, timeout time.Duration, control func(network, address string, c syscall.RawConn) error,
	done func(*Socket, error)) (cancel func(error), handled bool) {
	c, ok := client.(*Socket)
	if !ok || c.isConn() || !to.IsValid() || to.Addr().Zone() != "" {
		return nil, false
	}
	origin, err := connectSocket(to, control)
	d := &dialing{client: c, origin: origin, done: done, to: to}
	if timeout > 0 {
		d.deadline = clock() + int64(timeout)
	}
	loop, rerr := c.register(c.home, d.clientEvent)
	if rerr != nil {
		if origin != nil {
			origin.Abort()
		}
		return nil, false
	}
	if err == nil {
		_, err = origin.register(loop, d.originEvent)
	}
	loop.mu.Lock()
	defer loop.mu.Unlock()
	if err != nil {
		loop.post(&undial{d, err})
	} else if timeout > 0 {
		loop.post(d)
	}
	return func(cause error) { d.cancel(loop, cause) }, true
}

var errClientReset = fmt.Errorf("relay: the client has left: %w: %w", context.Canceled, syscall.ECONNRESET)

// dialing is one dial. What it says to done, it says on the loop's goroutine.
type dialing struct {
	timer
	client *Socket
	origin *Socket
	to     netip.AddrPort
	done   func(*Socket, error) // nil once called; the loop's goroutine's
}

// connectSocket begins to connect.
func connectSocket(to netip.AddrPort, control func(network, address string, c syscall.RawConn) error) (*Socket, error) {
	var (
		sa   unsafe.Pointer
		size uintptr
	)
	port := binary.NativeEndian.Uint16([]byte{byte(to.Port() >> 8), byte(to.Port())}) // in the network's order
	family := unix.AF_INET6
	if ip := to.Addr().Unmap(); ip.Is4() {
		family = unix.AF_INET
		sa, size = unsafe.Pointer(&unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: ip.As4()}), unix.SizeofSockaddrInet4
	} else {
		sa, size = unsafe.Pointer(&unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: ip.As16()}), unix.SizeofSockaddrInet6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	rawNoDelay(fd)
	s := &Socket{fd: fd, tcp: true, keepalive: true, peer: to}
	if control != nil {
		if err := control("tcp", to.String(), rawSocket{s}); err != nil {
			rawClose(fd)
			return nil, err
		}
	}
	if err := rawConnect(fd, sa, size); err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
		rawClose(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return s, nil
}

// inTurn sets the deadline.
func (d *dialing) inTurn(l *loop) {
	if d.done != nil {
		l.timers.set(d, d.deadline)
	}
}

func (d *dialing) at() *timer { return &d.timer }

func (d *dialing) timeUp(l *loop) { d.fail(l, context.DeadlineExceeded) }

func (d *dialing) originEvent(l *loop, events uint32) {
	switch {
	case d.done == nil:
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		switch err := failureOf(d.origin.fd, true); {
		case err == nil:
		case err == syscall.ECONNRESET && events&unix.EPOLLIN != 0:
			d.finish(l, d.origin, nil) // it was connected, has sent, and was reset: that is the pair's to pass on
		default:
			d.fail(l, os.NewSyscallError("connect", err))
		}
	case events&unix.EPOLLOUT != 0 && d.origin.isItself():
		d.fail(l, os.NewSyscallError("connect", unix.ECONNREFUSED))
	case events&unix.EPOLLOUT != 0:
		d.finish(l, d.origin, nil)
	}
}

func (d *dialing) clientEvent(l *loop, events uint32) {
	if d.done != nil && events&unix.EPOLLERR != 0 {
		d.fail(l, errClientReset)
	}
}

func (d *dialing) fail(l *loop, err error) {
	if d.origin != nil {
		d.origin.Abort()
	}
	d.finish(l, nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(d.to), Err: err})
}

func (d *dialing) finish(l *loop, s *Socket, err error) {
	l.timers.remove(d)
	done := d.done
	d.done = nil
	done(s, err)
}

func (d *dialing) cancel(l *loop, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.post(&undial{d, cause})
	}
}

// undial ends a dial.
type undial struct {
	*dialing
	err error
}

func (u *undial) inTurn(l *loop) {
	if u.done != nil {
		u.fail(l, u.err)
	}
}

// isItself says that a socket has connected to itself, as one can to a port of the kernel's own range where nobody listens.
func (s *Socket) isItself() bool {
	if s.peer.Port() < 1024 {
		return false
	}
	sa, err := syscall.Getsockname(s.fd)
	return err == nil && addrPortOf(sa) == netip.AddrPortFrom(s.peer.Addr().Unmap(), s.peer.Port())
}
