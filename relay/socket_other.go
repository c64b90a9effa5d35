//go:build !linux

package relay

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Socket is, on Linux, a stream socket that Go's poller does not know. Here there are none.
type Socket struct{ net.Conn }

// CloseWrite half-closes the conn beneath.
func (s *Socket) CloseWrite() error {
	if h, ok := s.Conn.(HalfCloser); ok {
		return h.CloseWrite()
	}
	return ErrNoHalfClose
}

// Abort aborts the conn beneath.
func (s *Socket) Abort() error { return Abort(s.Conn) }

// SyscallConn returns the descriptor of the conn beneath.
func (s *Socket) SyscallConn() (syscall.RawConn, error) {
	if c, ok := s.Conn.(syscall.Conn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// SocketListener returns ln.
func SocketListener(ln net.Listener) (net.Listener, error) { return ln, nil }

// DialSocket handles no dial here.
func DialSocket(client net.Conn, to netip.AddrPort, timeout time.Duration, control func(network, address string, c syscall.RawConn) error,
	done func(*Socket, error)) (cancel func(error), handled bool) {
	return nil, false
}

// Acceptor accepts Sockets. Here there are none.
type Acceptor struct{}

// AcceptSockets handles no listener here.
func AcceptSockets(ln net.Listener, take func(*Socket), fail func(error)) (a *Acceptor, handled bool) {
	return nil, false
}

// Pause does nothing.
func (a *Acceptor) Pause() {}

// Resume does nothing.
func (a *Acceptor) Resume() {}

// Close does nothing.
func (a *Acceptor) Close() {}

func (s *Socket) below() below { return below{} }

func ordinary(c io.ReadWriteCloser) io.ReadWriteCloser { return c }

func become(c io.ReadWriteCloser) io.ReadWriteCloser { return c }
