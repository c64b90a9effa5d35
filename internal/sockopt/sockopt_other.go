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
