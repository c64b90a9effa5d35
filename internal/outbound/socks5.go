package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

// SOCKS5 opens streams through a SOCKS5 proxy, RFC 1928. Names are resolved by that proxy.
type SOCKS5 struct {
	Server proxy.Addr

	// User and Password are shown to a proxy that asks for them, RFC 1929, in the clear.
	// An empty User: none are offered.
	User, Password string

	// Via opens the conn to Server. Nil: a zero [Direct].
	Via proxy.Dialer
}

// DialStream implements [proxy.Dialer]. The conn that it returns is the one to the proxy, with
// nothing around it: after the handshake it carries dst's bytes and no others.
//
// An error says which hop failed: "proxy unreachable" for the way to the proxy, the proxy's address alone
// for the talk with it, and the origin's too for what the proxy said of that. ReasonOf knows all three.
func (s *SOCKS5) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	if dst.Network != "tcp" {
		return nil, fmt.Errorf("outbound: socks5 %v: cannot ask for %v: %w", s.Server, dst, errors.ErrUnsupported)
	}
	conn, _, err := s.request(ctx, socks5.Connect, dst)
	return conn, err
}

func (s *SOCKS5) via() proxy.Dialer {
	if s.Via == nil {
		return &Direct{}
	}
	return s.Via
}

// request asks the proxy for cmd and dst, and returns the conn to it and the address that it names.
func (s *SOCKS5) request(ctx context.Context, cmd socks5.Command, dst proxy.Addr) (net.Conn, socks5.Addr, error) {
	conn, err := s.via().DialStream(ctx, s.Server)
	if err != nil {
		return nil, socks5.Addr{}, ofHop(fmt.Errorf("outbound: socks5 %v: proxy unreachable: %w", s.Server, err))
	}
	// The end of ctx breaks the conn off, which interrupts the handshake. A deadline would have to be taken
	// off again, and conns inside SSH have none. It is a reset, for a proxy that sees a clean end may take
	// it for a half-close by somebody who still waits, and go on dialling dst.
	stop := context.AfterFunc(ctx, func() { relay.Abort(conn) })
	client := socks5.Client{User: s.User, Password: s.Password}
	bound, err := client.Handshake(conn, cmd, socks5.Addr{Host: dst.Host, Port: dst.Port})
	if !stop() {
		err = fmt.Errorf("no answer for %v: %w", dst, context.Cause(ctx)) // and not that the conn was closed
	} else if reply, ok := errors.AsType[socks5.Reply](err); ok {
		if cmd == socks5.Connect {
			err = ofOrigin(fmt.Errorf("origin %v: %w", dst, reply))
		} else {
			err = fmt.Errorf("%v: %w", cmd, reply)
		}
	}
	if err != nil {
		conn.Close()
		return nil, socks5.Addr{}, fmt.Errorf("outbound: socks5 %v: %w", s.Server, err)
	}
	return conn, bound, nil
}

// reachable returns the address that the proxy has named at the other end of conn; one that only says "here" is that of
// the proxy itself.
func (s *SOCKS5) reachable(bound socks5.Addr, conn net.Conn) socks5.Addr {
	ip, err := netip.ParseAddr(bound.Host)
	if bound.Host != "" && (err != nil || !ip.IsUnspecified()) {
		return bound
	}
	bound.Host = s.Server.Host
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		if _, direct := s.via().(*Direct); direct {
			bound.Host = a.AddrPort().Addr().Unmap().String()
		}
	}
	return bound
}
