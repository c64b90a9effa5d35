package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

var _ proxy.Binder = (*SOCKS5)(nil)

// Bind implements proxy.Binder by BIND, RFC 1928 section 4: the proxy listens. The listener accepts one stream, which is the
// conn to the proxy, bare.
func (s *SOCKS5) Bind(ctx context.Context, from proxy.Addr) (net.Listener, error) {
	if from.Network != "tcp" {
		return nil, fmt.Errorf("outbound: socks5 %v: cannot bind for %v: %w", s.Server, from, errors.ErrUnsupported)
	}
	conn, bound, err := s.request(ctx, socks5.Bind, from)
	if err != nil {
		return nil, err
	}
	l := &socks5Listener{socks: s, at: tcpAddr(s.reachable(bound, conn)), conn: conn}
	l.stop = context.AfterFunc(ctx, func() { l.Close() })
	return l, nil
}

// socks5Listener is a proxy that listens for one stream.
type socks5Listener struct {
	socks    *SOCKS5
	at, peer net.Addr
	stop     func() bool

	mu   sync.Mutex
	conn net.Conn // nil: accepted, or closed
}

// Addr returns where the proxy listens.
func (l *socks5Listener) Addr() net.Addr { return l.at }

// Peer returns the address of the host whose stream was accepted.
func (l *socks5Listener) Peer() net.Addr { return l.peer }

// Accept waits for the proxy to say that the stream is there.
func (l *socks5Listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	conn := l.conn
	l.mu.Unlock()
	if conn == nil {
		return nil, net.ErrClosed
	}
	peer, err := socks5.ReadReply(conn)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, net.ErrClosed
	}
	if err != nil {
		return nil, fmt.Errorf("outbound: socks5 %v: %v: %w", l.socks.Server, socks5.Bind, err)
	}
	l.peer, l.conn = tcpAddr(peer), nil
	return conn, nil
}

// Close implements net.Listener. What was accepted stays open.
func (l *socks5Listener) Close() error {
	l.stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		relay.Abort(l.conn)
		l.conn = nil
	}
	return nil
}

// hostAddr is an address whose host may be a name.
type hostAddr struct{ proxy.Addr }

// Network implements net.Addr.
func (a hostAddr) Network() string { return a.Addr.Network }

// String implements net.Addr.
func (a hostAddr) String() string { return a.HostPort() }

func tcpAddr(a socks5.Addr) net.Addr {
	t := proxy.TCP(a.Host, a.Port)
	if ip := t.IP(); ip.IsValid() {
		return &net.TCPAddr{IP: ip.AsSlice(), Zone: ip.Zone(), Port: int(a.Port)}
	}
	return hostAddr{t}
}
