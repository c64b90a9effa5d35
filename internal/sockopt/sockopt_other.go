//go:build !linux

package sockopt

import (
	"errors"
	"net/netip"
)

func setMark(int, int) error { return errors.ErrUnsupported }

func bindToDevice(int, string) error { return errors.ErrUnsupported }

func setTransparent(int) error { return errors.ErrUnsupported }

func originalDst(int, bool) (netip.AddrPort, error) { return netip.AddrPort{}, errors.ErrUnsupported }

func askOriginalDsts(int, bool) error { return errors.ErrUnsupported }

func reuseAddress(int) error { return errors.ErrUnsupported }

// OriginalDstOf finds nothing here.
func OriginalDstOf([]byte) netip.AddrPort { return netip.AddrPort{} }
