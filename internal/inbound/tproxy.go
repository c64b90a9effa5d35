package inbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"syscall"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
)

// TProxy takes TCP clients and datagrams that a TPROXY rule of the packet filter hands to it, and sends each where it was going. A client
// whose destination cannot be reached is reset. One that has connected to the port itself is refused: it has no destination.
//
// The rule names an address to hand packets to, which may be a loopback address, also for traffic of other machines.
// Linux, with CAP_NET_ADMIN.
type TProxy struct {
	Listener
	Capture Capture // sets the rule up; nil: somebody else does
	// Mark is the mark of the sockets that face clients, by which rules for what this machine sends know them. 0: none.
	Mark int

	t transparent
}

var _ proxy.Inbound = (*TProxy)(nil)

// Listen implements proxy.Inbound.
func (p *TProxy) Listen(ctx context.Context) error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("inbound: tproxy works on Linux only: %w", errors.ErrUnsupported)
	}
	p.control = sockopt.All(p.options()...) // the sockets accepted inherit them
	p.t.listenPackets = p.listenPackets
	p.t.capture, p.t.destination = p.Capture, wanted
	p.t.hint = "only what a TPROXY rule hands to it has a destination"
	err := p.t.listen(ctx, &p.Listener)
	if errors.Is(err, syscall.EPERM) && len(p.t.listeners) == 0 {
		err = &bindError{"tproxy needs the capability CAP_NET_ADMIN: run as root, or `setcap cap_net_admin+ep` on the program", err}
	}
	return err
}

// HasIPv6 says whether p listens for IPv6, once it listens.
func (p *TProxy) HasIPv6() bool {
	return slices.ContainsFunc(p.t.at, func(a netip.AddrPort) bool { return !a.Addr().Unmap().Is4() })
}

// options are those of all sockets that face clients.
func (p *TProxy) options() []sockopt.Control {
	options := []sockopt.Control{sockopt.Transparent}
	if p.Mark != 0 {
		options = append(options, sockopt.Mark(p.Mark))
	}
	return options
}

// wanted is the address that c has connected to: that of the accepted socket.
func wanted(c *client) (netip.AddrPort, error) { return c.local, nil }

// Serve implements proxy.Inbound.
func (p *TProxy) Serve(ctx context.Context, h proxy.Handler) error { return p.t.serve(ctx, h) }

// Close implements proxy.Inbound. What Capture has set up goes with the last session.
func (p *TProxy) Close() error { return p.t.close() }

// Undo removes what Capture has set up, whatever goes on. Serve does so when it returns; it is for who does not wait for that.
func (p *TProxy) Undo() error { return p.t.end() }
