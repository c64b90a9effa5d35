//go:build !linux

package tundev

import (
	"errors"
	"fmt"
	"os"
)

type device struct{}

func unsupported() error {
	return fmt.Errorf("tundev: TUN devices are opened on Linux only: %w", errors.ErrUnsupported)
}

// Open is for Linux.
func Open(o Options) (*Device, error) { return nil, unsupported() }

// FromFile is for Linux.
func FromFile(f *os.File, mtu int) (*Device, error) { return nil, unsupported() }

// ReadPacket is for Linux.
func (d *Device) ReadPacket(h *Header, bufs [][]byte) (n int, err error) { return 0, unsupported() }

// WritePacket is for Linux.
func (d *Device) WritePacket(h Header, bufs [][]byte) error { return unsupported() }

// Close is for Linux.
func (d *Device) Close() error { return nil }
