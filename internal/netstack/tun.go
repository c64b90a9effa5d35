package netstack

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// TUN is the inbound for all traffic of a machine or a network namespace: a Stack on a device that the traffic is led into while
// it listens. Set Setup, and the Stack's fields but Open, before Listen.
type TUN struct {
	Stack
	Setup tundev.Setup

	mu      sync.Mutex
	link    *tundev.Link // what leads traffic into the device, or has
	serving bool
}

var _ proxy.Inbound = (*TUN)(nil)

// Listen implements proxy.Inbound. From its return on, traffic waits to be served.
func (t *TUN) Listen(ctx context.Context) error {
	t.Stack.Open = t.open
	if err := t.Stack.Listen(ctx); err != nil {
		return errors.Join(err, t.Undo())
	}
	return nil
}

func (t *TUN) open(context.Context) (*tundev.Device, error) {
	link, err := t.Setup.Up()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.link = link
	return link.Device, nil
}

// Serve implements proxy.Inbound. When it returns, the network is as it was.
func (t *TUN) Serve(ctx context.Context, h proxy.Handler) (err error) {
	defer func() { err = errors.Join(err, t.Undo()) }()
	t.mu.Lock()
	t.serving = true
	t.mu.Unlock()
	return t.Stack.Serve(ctx, h)
}

// Close implements proxy.Inbound. New connections go past the device from now on, as if it were not there; those of this
// machine that go through it stay.
func (t *TUN) Close() error {
	t.mu.Lock()
	link, serving := t.link, t.serving
	t.mu.Unlock()
	if link == nil {
		return t.Stack.Close()
	}
	if serving {
		return errors.Join(link.Drain(), t.Stack.Close())
	}
	return errors.Join(t.Stack.Close(), t.Undo())
}

// Undo puts the network back to what it was, whatever goes on, once. Serve does so when it returns; it is for who
// does not wait for that. When it returns the network is as it was, whoever has seen to it.
func (t *TUN) Undo() error {
	t.mu.Lock()
	link := t.link
	t.mu.Unlock()
	if link == nil {
		return nil
	}
	return link.Down()
}

// HasIPv6 says whether IPv6 is led into the device. Call it between Listen and Close.
func (t *TUN) HasIPv6() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.link != nil && len(t.link.Addrs) > 1
}

// BoundAddr returns the device as an address, of network "tun".
func (t *TUN) BoundAddr() net.Addr { return tunAddr(t.Setup) }

type tunAddr tundev.Setup

func (tunAddr) Network() string { return "tun" }

// String returns the device's name, behind that of its namespace.
func (a tunAddr) String() string {
	name := a.Name
	if name == "" {
		name = tundev.DefaultName
	}
	if a.Namespace != "" {
		return a.Namespace + "/" + name
	}
	return name
}
