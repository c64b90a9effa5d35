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

// SOCKS5 takes in clients that say by SOCKS5 where they want to go, RFC 1928: by CONNECT, BIND and UDP ASSOCIATE.
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
	if req.Command == socks5.UDPAssociate {
		associate(ctx, h, p, req)
		return
	}
	if req.Command != socks5.Connect && req.Command != socks5.Bind {
		p.reply(socks5.CommandUnsupported, nil)
		c.fail(fmt.Errorf("inbound: socks5: client asked for %v, which there is not: %w", req.Command, errors.ErrUnsupported))
		return
	}
	if err := c.handshook(); err != nil {
		c.fail(err)
		return
	}
	f := c.flow(proxy.TCP(req.Addr.Host, req.Addr.Port), req.User)
	if req.Command == socks5.Bind {
		h.HandleStream(ctx, f, &socks5Expectant{socks5Pending: p})
		return
	}
	h.HandleStream(ctx, f, p)
}

// socks5Pending is a client that waits for the reply to its CONNECT.
type socks5Pending struct{ *client }

// Accept implements [proxy.Pending].
func (p *socks5Pending) Accept() (net.Conn, []byte, error) {
	return p.accept(nil)
}

func (p *socks5Pending) accept(named net.Addr) (net.Conn, []byte, error) {
	if err := p.reply(socks5.Succeeded, named); err != nil {
		p.Close()
		return nil, nil, fmt.Errorf("inbound: %w", err)
	}
	return p.give(), p.head, nil
}

// Reject implements [proxy.Pending].
func (p *socks5Pending) Reject(err error) {
	if p.reply(socks5Reply(proxy.ReasonOf(err)), nil) != nil {
		p.Close()
		return
	}
	p.hangUp()
}

// replyTimeout is how long a client may take to take ten bytes. The kernel takes them at once for a
// client that has read its earlier answers.
const replyTimeout = time.Second

// reply writes the reply. To CONNECT it names no address: the one that RFC 1928 has in mind, of the near end of
// the connection to the destination, is not known here, and may belong to another machine.
func (p *socks5Pending) reply(r socks5.Reply, named net.Addr) error {
	p.SetWriteDeadline(time.Now().Add(replyTimeout))
	defer p.SetWriteDeadline(time.Time{})
	var at netip.AddrPort
	if named != nil {
		at, _ = netip.ParseAddrPort(named.String()) // a name, which a proxy behind us may have, cannot be told
	}
	return socks5.WriteReply(p, r, at)
}

// socks5Expectant is a client that waits for the two replies to its BIND.
type socks5Expectant struct {
	*socks5Pending
	from net.Addr
}

var _ proxy.Expectant = (*socks5Expectant)(nil)

// Bound implements [proxy.Expectant]. What listens at all addresses listens, for this client, where the client has come to.
func (p *socks5Expectant) Bound(at net.Addr) error {
	if t, ok := at.(*net.TCPAddr); ok && t.IP.IsUnspecified() && p.local.IsValid() {
		at = net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.local.Addr(), uint16(t.Port)))
	}
	return p.reply(socks5.Succeeded, at)
}

// Came implements [proxy.Expectant].
func (p *socks5Expectant) Came(from net.Addr) { p.from = from }

// Accept implements [proxy.Pending].
func (p *socks5Expectant) Accept() (net.Conn, []byte, error) { return p.accept(p.from) }

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
