//go:build !linux

package netstack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
)

// Pinger is for Linux.
type Pinger struct {
	// Control is not called.
	Control func(network, address string, c syscall.RawConn) error
}

// Ping is for Linux.
func (p *Pinger) Ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	return fmt.Errorf("netstack: echoes are sent on Linux only: %w", errors.ErrUnsupported)
}
