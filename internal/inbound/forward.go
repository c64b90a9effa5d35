package inbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Forward sends every client to one destination. A client whose destination cannot be reached is
// reset, as it would be by a host where nobody listens. At a UDP address it forwards datagrams, to a destination that is
// UDP as well; then AcceptProxy and SendProxy cannot be.
type Forward struct {
	Listener
	To proxy.Addr // where all clients go

	// SendProxy is the version, 1 or 2, of the PROXY header that the destination's stream begins
	// with and that tells it the client's address; 0: none. For a client of a Unix socket, which
	// has no address, the header says UNKNOWN or LOCAL.
	SendProxy int

	packets *demux // nil but for UDP
}

var _ proxy.Inbound = (*Forward)(nil)

// Listen implements proxy.Inbound.
func (f *Forward) Listen(ctx context.Context) error {
	if f.To == (proxy.Addr{}) {
		return errors.New("inbound: forward: no destination")
	}
	if f.SendProxy < 0 || f.SendProxy > 2 {
		return fmt.Errorf("inbound: forward: there is no version %d of the PROXY header (1 or 2)", f.SendProxy)
	}
	if (f.Addr.Network == "udp") != (f.To.Network == "udp") {
		return fmt.Errorf("inbound: forward: cannot forward from %v to %v: datagrams on one side only", f.Addr, f.To)
	}
	if f.Addr.Network == "udp" {
		return f.listenPackets(ctx)
	}
	if err := f.Listener.Listen(ctx); err != nil || f.AcceptProxy {
		return err
	}
	return f.silent()
}

// Serve implements proxy.Inbound.
func (f *Forward) Serve(ctx context.Context, h proxy.Handler) error {
	if f.packets != nil {
		return f.packets.serve(ctx, h)
	}
	handle := func(ctx context.Context, c *client) { f.serveClient(ctx, h, c) }
	if q, ok := h.(proxy.NowHandler); ok {
		now := func(ctx context.Context, c *client) bool {
			return q.HandleStreamNow(ctx, c.flow(f.To, ""), f.pending(c))
		}
		if f.serveSockets(ctx, handle, now) {
			return nil
		}
	}
	return f.serve(ctx, handle)
}

func (f *Forward) serveClient(ctx context.Context, h proxy.Handler, c *client) {
	if err := c.handshook(); err != nil {
		c.fail(err)
		return
	}
	h.HandleStream(ctx, c.flow(f.To, ""), f.pending(c))
}

func (f *Forward) pending(c *client) *forwardPending { return &forwardPending{c, f.SendProxy} }

type forwardPending struct {
	*client
	sendProxy int
}

// Accept gives the bare conn away. The client need not be told anything.
func (p *forwardPending) Accept() (net.Conn, []byte, error) {
	if p.sendProxy == 0 {
		return p.give(), p.head, nil
	}
	head, err := proxyHeader(p.sendProxy, p.peer, p.local)
	if err != nil {
		p.abort()
		return nil, nil, fmt.Errorf("inbound: PROXY header: %w", err)
	}
	return p.give(), append(head, p.head...), nil
}

// Reject resets the client's conn.
func (p *forwardPending) Reject(error) { p.abort() }

// proxyHeader returns the header for a conn from client to local; without their addresses, one that says
// that they are not known.
func proxyHeader(version int, client, local netip.AddrPort) ([]byte, error) {
	var src, dst net.Addr
	if client.IsValid() && local.IsValid() {
		src, dst = net.TCPAddrFromAddrPort(client), net.TCPAddrFromAddrPort(local)
	}
	return proxyproto.HeaderProxyFromAddrs(byte(version), src, dst).Format()
}
