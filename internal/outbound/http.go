package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/sluice-proxy/sluice/internal/connect"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// HTTP opens streams through an HTTP proxy by CONNECT, RFC 9110 section 9.3.6. Names are resolved by
// that proxy.
type HTTP struct {
	Server proxy.Addr

	// User and Password are sent with each request, RFC 7617: in the clear, if TLS is nil.
	// An empty User: none are sent.
	User, Password string

	// TLS, if not nil, is for a proxy that speaks TLS itself (an https:// proxy). It is not changed.
	// Its ServerName is by default the host of Server; certificates are verified unless it says otherwise.
	TLS *tls.Config

	// Via opens the conn to Server. Nil: a zero [Direct].
	Via proxy.Dialer
}

var _ proxy.Dialer = (*HTTP)(nil)

// DialStream implements [proxy.Dialer]. The conn that it returns is the one to the proxy, or the
// [*tls.Conn] over it, with nothing around it but the bytes of dst that came with the proxy's answer.
//
// An error says which hop failed: "proxy unreachable" for the way to the proxy, the proxy's address alone
// for the talk with it, and the origin's too for what the proxy said of that. ReasonOf knows all three.
func (h *HTTP) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	scheme := "http"
	if h.TLS != nil {
		scheme = "https"
	}
	if dst.Network != "tcp" {
		return nil, fmt.Errorf("outbound: %s %v: cannot ask for %v: %w", scheme, h.Server, dst, errors.ErrUnsupported)
	}
	via := h.Via
	if via == nil {
		via = &Direct{}
	}
	conn, err := via.DialStream(ctx, h.Server)
	if err != nil {
		return nil, ofHop(fmt.Errorf("outbound: %s %v: proxy unreachable: %w", scheme, h.Server, err))
	}
	// The end of ctx breaks the conn off, which interrupts the handshake. A deadline would have to be taken
	// off again, and conns inside SSH have none. It is a reset, for a proxy that sees a clean end may take
	// it for a half-close by somebody who still waits, and go on dialling dst.
	stop := context.AfterFunc(ctx, func() { relay.Abort(conn) })
	tunnel, err := h.handshake(conn, dst)
	if !stop() {
		err = fmt.Errorf("no answer for %v: %w", dst, context.Cause(ctx)) // and not that the conn was closed
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("outbound: %s %v: %w", scheme, h.Server, err)
	}
	return tunnel, nil
}

// handshake asks the proxy at the other end of conn for dst.
func (h *HTTP) handshake(conn net.Conn, dst proxy.Addr) (net.Conn, error) {
	if h.TLS != nil {
		config := h.TLS.Clone()
		if config.ServerName == "" {
			config.ServerName = h.Server.Host
		}
		secure := tls.Client(conn, config)
		if err := secure.Handshake(); err != nil {
			return nil, fmt.Errorf("TLS with the proxy: %w", err)
		}
		conn = secure
	}
	if err := connect.WriteRequest(conn, dst.Host, dst.Port, h.User, h.Password); err != nil {
		return nil, err
	}
	rest, err := connect.ReadResponse(conn)
	if status, ok := errors.AsType[*connect.StatusError](err); ok {
		if status.Code == 407 {
			return nil, err // about us, not about dst
		}
		return nil, ofOrigin(fmt.Errorf("origin %v: %w", dst, err))
	}
	if err != nil {
		return nil, err
	}
	return relay.WithHead(conn, rest), nil
}
