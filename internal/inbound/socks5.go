package inbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
)

// SOCKS5 takes in clients that say by SOCKS5 where they want to go, RFC 1928. It serves CONNECT;
// BIND and UDP ASSOCIATE are answered as not supported.
//
// A client hears success only when its destination was reached, and otherwise the reason. It may send
// its first bytes right behind its request, before it has heard anything.
type SOCKS5 struct {
	Listener

	// Users are who may come in, by name and password, RFC 1929. Nil Users let everybody in: also those
	// who can only come with a name and a password, whatever they are.
	Users Users
}

// Serve implements [proxy.Inbound].
func (s *SOCKS5) Serve(ctx context.Context, h proxy.Handler) error {
	return s.serve(ctx, func(ctx context.Context, c *client) { s.serveClient(ctx, h, c) })
}

// serveClient runs c's handshake and hands over what it asks for.
func (s *SOCKS5) serveClient(ctx context.Context, h proxy.Handler, c *client) {
	server := &socks5.Server{}
	if s.Users != nil {
		server.Check = s.Users.Check
	}
	// What follows the request stays in the kernel, or in c.head: the handshake reads nothing of it.
	req, err := server.Handshake(struct {
		io.Reader
		io.Writer
	}{c.reader(), c})
	if err != nil {
		c.fail(fmt.Errorf("inbound: %w", err))
		return
	}
	p := &socks5Pending{c}
	if req.Command != socks5.Connect {
		p.reply(socks5.CommandUnsupported)
		c.fail(fmt.Errorf("inbound: socks5: client asked for %v, and only CONNECT is served: %w",
			req.Command, errors.ErrUnsupported))
		return
	}
	if err := c.handshook(); err != nil {
		c.fail(err)
		return
	}
	h.HandleStream(ctx, c.flow(proxy.TCP(req.Addr.Host, req.Addr.Port), req.User), p)
}

// socks5Pending is a client that waits for the reply to its CONNECT.
type socks5Pending struct{ *client }

// Accept implements [proxy.Pending].
func (p *socks5Pending) Accept() (net.Conn, []byte, error) {
	if err := p.reply(socks5.Succeeded); err != nil {
		p.Close()
		return nil, nil, fmt.Errorf("inbound: %w", err)
	}
	return p.give(), p.head, nil
}

// Reject implements [proxy.Pending].
func (p *socks5Pending) Reject(err error) {
	if p.reply(socks5Reply(proxy.ReasonOf(err))) != nil {
		p.Close()
		return
	}
	p.hangUp()
}

// replyTimeout is how long a client may take to take ten bytes. The kernel takes them at once for a
// client that has read its earlier answers.
const replyTimeout = time.Second

// reply writes the reply. It names no address: the one that RFC 1928 has in mind, of the near end of
// the connection to the destination, is not known here, and may belong to another machine.
func (p *socks5Pending) reply(r socks5.Reply) error {
	p.SetWriteDeadline(time.Now().Add(replyTimeout))
	defer p.SetWriteDeadline(time.Time{})
	return socks5.WriteReply(p, r, netip.AddrPort{})
}

// socks5Reply returns the reply that says r.
func socks5Reply(r proxy.Reason) socks5.Reply {
	switch r {
	case proxy.Denied:
		return socks5.NotAllowed
	case proxy.NetUnreachable:
		return socks5.NetworkUnreachable
	case proxy.HostUnreachable, proxy.NoHost:
		return socks5.HostUnreachable
	case proxy.Refused:
		return socks5.ConnectionRefused
	case proxy.Timeout:
		return socks5.TTLExpired
	case proxy.Unsupported:
		return socks5.CommandUnsupported
	}
	return socks5.GeneralFailure
}
