package inbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"syscall"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
)

// Redirect takes TCP clients that a REDIRECT rule of the packet filter has turned to it, and sends each where it was going. A
// client whose destination cannot be reached is reset. One that has connected to the port itself is refused: it has no destination.
//
// Traffic of this machine arrives at a loopback address; traffic that the machine forwards arrives at an address of the interface
// where it came in, so that the listener must be there, or at all addresses. Linux.
type Redirect struct {
	Listener
	Capture Capture // sets the rule up; nil: somebody else does

	t transparent
}

var _ proxy.Inbound = (*Redirect)(nil)

// Listen implements proxy.Inbound.
func (r *Redirect) Listen(ctx context.Context) error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("inbound: redirect works on Linux only: %w", errors.ErrUnsupported)
	}
	r.t.capture, r.t.destination = r.Capture, originalDst
	r.t.hint = "it connected to this port itself; or a rule redirects our own connections: exempt them by a mark (--mark)"
	return r.t.listen(ctx, &r.Listener)
}

// originalDst asks the kernel where c was going before it was redirected.
func originalDst(c *client) (netip.AddrPort, error) {
	conn, ok := c.Conn().(syscall.Conn)
	if !ok {
		return netip.AddrPort{}, errDirect
	}
	dst, err := sockopt.OriginalDst(conn, c.local.Addr())
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOPROTOOPT) || err == nil && dst == c.local {
		return netip.AddrPort{}, errDirect // the kernel knows of no rewriting
	}
	return dst, err
}

// Serve implements proxy.Inbound.
func (r *Redirect) Serve(ctx context.Context, h proxy.Handler) error { return r.t.serve(ctx, h) }

// Close implements proxy.Inbound. What Capture has set up goes with the last session.
func (r *Redirect) Close() error { return r.t.close() }

// Undo removes what Capture has set up, whatever goes on. Serve does so when it returns; it is for who does not wait for that.
func (r *Redirect) Undo() error { return r.t.end() }
