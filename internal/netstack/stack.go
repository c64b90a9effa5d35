// Package netstack is an inbound for whole IP packets: it answers as every host in the world would.
//
// A [Stack] reads the packets of a TUN device and runs the TCP, UDP and ICMP of all their destinations in user space, on
// gVisor's TCP/IP. A SYN becomes a pending stream, which is answered when the destination was dialled and as the
// dial ended: by a SYN-ACK, a RST, an ICMP message, or silence. The datagrams of one source become one session,
// whatever their destinations.
package netstack

import (
	"context"
	"log/slog"
	"net/netip"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Stack is an inbound that takes the streams and datagrams out of a device's packets. Set its fields before Listen.
type Stack struct {
	Name string // for flows and logs

	// Open returns the device; Listen calls it, and the Stack closes the device. It should be up.
	Open func(ctx context.Context) (*tundev.Device, error)

	MaxPending  int // streams whose dial goes on at a time; further SYNs are dropped. 0: DefaultMaxPending
	MaxSessions int // sources of datagrams at a time; datagrams of further ones are dropped. 0: DefaultMaxSessions

	// Ping asks dst for an answer to an ICMP echo with this payload, and returns nil once it is there. An echo
	// request from the device is answered when Ping returns nil, and not at all otherwise. Nil: none is answered.
	Ping func(ctx context.Context, dst netip.Addr, payload []byte) error

	Log *slog.Logger // nil: silent

}

// The defaults of a Stack's budgets.
const (
	DefaultMaxPending  = 4096
	DefaultMaxSessions = 4096
)

var _ proxy.Inbound = (*Stack)(nil)

// Listen implements proxy.Inbound: it opens the device.
func (s *Stack) Listen(ctx context.Context) error { panic("not yet") }

// Serve implements proxy.Inbound. It returns an error that wraps [tundev.ErrGone] when the device was deleted.
func (s *Stack) Serve(ctx context.Context, h proxy.Handler) error { panic("not yet") }

// Close implements proxy.Inbound. New streams are not taken any more; those there are go on until Serve's context ends them.
func (s *Stack) Close() error { panic("not yet") }

// Device returns the device that Listen opened; nil before.
func (s *Stack) Device() *tundev.Device { panic("not yet") }
