// Package proxy is where the parts of the program meet.
//
// Data takes one way. An inbound accepts a client, reads what it asks for, and hands over a
// [Flow] (who wants to go where) with a [Pending] (a client that still waits for its answer).
// The [Engine] asks its router for a [Dialer], dials, and only then accepts or rejects the
// client, so that no client is told yes before its origin said yes. Then it relays, and in the
// end records one line.
//
// Inbounds know nothing of outbounds and the other way round; both know this package.
package proxy

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// Flow says who wants to go where. It is set by the inbound and not changed afterwards.
type Flow struct {
	Inbound string         // name of the inbound that took it in
	Client  netip.AddrPort // the client's address; the zero value for a Unix socket
	Local   netip.AddrPort // the address that the client connected to; zero for a Unix socket
	User    string         // who the client proved to be; empty without authentication
	Dst     Addr           // where it wants to go, not resolved
}

// Pending is a stream whose client still waits to hear whether its destination can be reached.
// One of Accept and Reject is called, once, and after it Done.
type Pending interface {
	// Accept tells the client yes and gives its conn away: the caller closes c.
	// head is what the client has already sent; it precedes what c yields.
	// On an error the conn is closed already.
	Accept() (c net.Conn, head []byte, err error)
	// Reject tells the client no, as exactly as its protocol can, and closes its conn.
	Reject(err error)
	// Done ends the session: its conns are closed, and what it counted against is free again.
	Done()
}

// Releaser is a Pending that need not stay for as long as the session does.
type Releaser interface {
	// Release is called after Accept: p is not used any more, and done is called in place of Done.
	Release() (done func())
}

// Watched is implemented by a Pending whose client's conn can be watched while the dial goes on:
// a client that resets its conn does not want the answer any more. A client that half-closes
// still does.
type Watched interface {
	// Conn returns the client's conn. It must neither be read, written nor closed.
	Conn() net.Conn
}

// Handler takes sessions over from inbounds.
type Handler interface {
	// HandleStream answers p and carries the session. It may return while the session goes on:
	// the session is over when it calls p.Done. Cancelling ctx aborts the session.
	HandleStream(ctx context.Context, f Flow, p Pending)
	// HandlePackets carries the datagrams of one client, whose first goes to f.Dst, until there are no more or ctx is
	// cancelled, and closes c. It returns when the session is over.
	HandlePackets(ctx context.Context, f Flow, c relay.PacketConn)
}

// Expectant is a Pending whose client wants a stream that comes from the flow's destination, and not one that goes
// there (BIND of SOCKS5, RFC 1928 section 4). Accept and Reject tell it of that stream.
type Expectant interface {
	Pending
	// Bound tells the client where the stream is to come to. It is called once, before Accept, and not at
	// all where no place can be had. On an error Reject is still to be called.
	Bound(at net.Addr) error
	// Came tells it, before Accept, of the address that the stream came from, as far as that is known.
	Came(from net.Addr)
}

// NowHandler is a Handler that can begin some sessions without blocking.
type NowHandler interface {
	Handler
	// HandleStreamNow is HandleStream for a p whose methods do not block, called from a goroutine that must not
	// block either. Where it would have to, it does nothing and returns false.
	HandleStreamNow(ctx context.Context, f Flow, p Pending) bool
}

// Inbound takes clients in.
type Inbound interface {
	// Listen binds. All that can be wrong with the settings is said here, before traffic flows.
	Listen(ctx context.Context) error
	// Serve takes clients until Close and returns after its last session is done.
	// Cancelling ctx closes the inbound and aborts its sessions.
	Serve(ctx context.Context, h Handler) error
	// Close stops accepting; clients that have not finished their handshake are closed,
	// sessions go on. It may be called twice, and before Serve.
	Close() error
}

// Dialer opens streams to destinations: directly, or through an upstream proxy.
type Dialer interface {
	// DialStream connects to dst. It returns the bare conn wherever the protocol leaves it bare
	// after its handshake, with what was read too much put back by [relay.WithHead].
	// The caller closes the conn. The error says the reason in a form that [ReasonOf] knows.
	DialStream(ctx context.Context, dst Addr) (net.Conn, error)
}

// PacketDialer is a Dialer that can carry datagrams too.
type PacketDialer interface {
	Dialer
	// DialPackets opens a way for the datagrams of one client, which go to dst first, and wherever else their
	// endpoints say. The caller closes the conn. Where it cannot be, the error is [errors.ErrUnsupported].
	DialPackets(ctx context.Context, dst Addr) (relay.PacketConn, error)
}

// Binder is a Dialer that can also wait for a stream.
type Binder interface {
	Dialer
	// Bind listens for one stream from the host of from, which may be a name, and from any port. An unspecified
	// address stands for any host. The listener's Addr is what that host is to connect to, its Accept returns only streams of
	// that host, and it ends with ctx. Where a stream's RemoteAddr is not that host's, the listener has a method
	// Peer() net.Addr that returns it. The caller closes the listener. Where it cannot be, the error is [errors.ErrUnsupported].
	Bind(ctx context.Context, from Addr) (net.Listener, error)
}

// Starter is a Dialer that can also dial without a goroutine, for clients that are a [relay.Socket].
type Starter interface {
	// StartDial begins to dial dst for client, whose reset cancels it. done is called once with the
	// outcome, at any time, also before StartDial returns, and must not block. The timeout is that of
	// the dial, 0 for none. cancel gives the dial up. Where handled is false nothing was done: DialStream is the way.
	StartDial(client net.Conn, dst Addr, timeout time.Duration, done func(net.Conn, error)) (cancel func(error), handled bool)
}

// Router chooses the way out for a flow. It does no I/O.
type Router interface {
	// Route returns the dialer for f and its name for the log.
	Route(f Flow) (name string, d Dialer)
}

// NowRouter is a Router that may have to block for some flows, to find out more of the client.
type NowRouter interface {
	Router
	// RouteNow is Route for a caller that must not block. Where ok is false nothing was done: Route is the way.
	RouteNow(f Flow) (name string, d Dialer, ok bool)
}

// Static is a Router that sends every flow the same way.
type Static struct {
	Name   string
	Dialer Dialer
}

// Route returns s.
func (s Static) Route(Flow) (string, Dialer) { return s.Name, s.Dialer }
