//go:build !linux

package tundev

import "net/netip"

// Link is for Linux.
type Link struct {
	Device *Device
	Addrs  []netip.Prefix
}

// Up is for Linux.
func (s *Setup) Up() (*Link, error) { return nil, unsupported() }

// Drain is for Linux.
func (l *Link) Drain() error { return nil }

// Down is for Linux.
func (l *Link) Down() error { return nil }

// Clean is for Linux.
func Clean(namespace string) (Cleaned, error) { return Cleaned{}, unsupported() }
