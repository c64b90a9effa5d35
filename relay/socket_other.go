//go:build !linux

package relay

import (
	"io"
	"net"
	"net/netip"
	"time"
)

// Socket is, on Linux, a stream socket that Go's poller does not know. Here there are none.
type Socket struct{ net.Conn }

// SocketListener returns ln.
func SocketListener(ln net.Listener) (net.Listener, error) { return ln, nil }

// DialSocket handles no dial here.
func DialSocket(client net.Conn, to netip.AddrPort, timeout time.Duration, done func(*Socket, error)) (cancel func(error), handled bool) {
	return nil, false
}

func (s *Socket) below() below { return below{} }

func ordinary(c io.ReadWriteCloser) io.ReadWriteCloser { return c }
