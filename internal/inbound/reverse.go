package inbound

import (
	"context"
	"errors"
	"net"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sshlink"
)

// Reverse listens on the far side of an SSH link, as ssh -R does, and sends every client to one
// destination on this side. A client whose destination cannot be reached is refused there.
//
// Allow and Deny are compared with the address that the server says the client has; Mode and
// AcceptProxy do not apply.
type Reverse struct {
	Listener
	Link *sshlink.Link
	To   proxy.Addr // where all clients go
}

var _ proxy.Inbound = (*Reverse)(nil)

// Listen implements proxy.Inbound. It connects the link, if it is not connected, and returns when the
// server listens. From then on the link is kept, and the server is asked again after each reconnect.
func (r *Reverse) Listen(ctx context.Context) error {
	if r.s != nil {
		return errors.New("inbound: Listen was called twice")
	}
	if r.To == (proxy.Addr{}) {
		return errors.New("inbound: reverse: no destination")
	}
	ln, err := r.Link.Listen(ctx, r.Addr.Network, r.Addr.HostPort())
	if err != nil {
		return err
	}
	r.listenOn(ln)
	return nil
}

// Serve implements proxy.Inbound.
func (r *Reverse) Serve(ctx context.Context, h proxy.Handler) error {
	return r.serve(ctx, func(ctx context.Context, c *client) { r.serveClient(ctx, h, c) })
}

func (r *Reverse) serveClient(ctx context.Context, h proxy.Handler, c *client) {
	if err := c.handshook(); err != nil {
		c.fail(err)
		return
	}
	h.HandleStream(ctx, c.flow(r.To, ""), &reversePending{c})
}

// reversePending is a client whose server waits to hear whether its stream is granted.
type reversePending struct{ *client }

// Accept grants the stream.
func (p *reversePending) Accept() (net.Conn, []byte, error) {
	c, err := p.Conn().(*sshlink.Incoming).Accept()
	return c, nil, err
}

// Reject refuses the stream, with the reason as far as SSH can tell it.
func (p *reversePending) Reject(err error) { p.Conn().(*sshlink.Incoming).Reject(err) }
