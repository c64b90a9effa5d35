//go:build !linux

package capture

import (
	"errors"
	"fmt"
	"net/netip"
)

type installed struct{}

var errNotLinux = fmt.Errorf("capture: rules can be set up on Linux only: %w", errors.ErrUnsupported)

// Begin cannot do anything here.
func (c *Capture) Begin([]netip.AddrPort) error { return errNotLinux }

// Stop has nothing to do.
func (c *Capture) Stop() error { return nil }

// End has nothing to do.
func (c *Capture) End() error { return nil }

// Clean finds nothing here.
func Clean() ([]string, error) { return nil, errNotLinux }
