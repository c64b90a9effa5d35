package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"

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
	via := s.Via
	if via == nil {
		via = &Direct{}
	}
	conn, err := via.DialStream(ctx, s.Server)
	if err != nil {
		return nil, ofHop(fmt.Errorf("outbound: socks5 %v: proxy unreachable: %w", s.Server, err))
	}
	// The end of ctx breaks the conn off, which interrupts the handshake. A deadline would have to be taken
	// off again, and conns inside SSH have none. It is a reset, for a proxy that sees a clean end may take
	// it for a half-close by somebody who still waits, and go on dialling dst.
	stop := context.AfterFunc(ctx, func() { relay.Abort(conn) })
	client := socks5.Client{User: s.User, Password: s.Password}
	_, err = client.Handshake(conn, socks5.Connect, socks5.Addr{Host: dst.Host, Port: dst.Port})
	if !stop() {
		err = fmt.Errorf("no answer for %v: %w", dst, context.Cause(ctx)) // and not that the conn was closed
	} else if reply, ok := errors.AsType[socks5.Reply](err); ok {
		err = ofOrigin(fmt.Errorf("origin %v: %w", dst, reply))
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("outbound: socks5 %v: %w", s.Server, err)
	}
	return conn, nil
}
