//go:build !linux

package sockopt

import "errors"

func setMark(int, int) error { return errors.ErrUnsupported }

func bindToDevice(int, string) error { return errors.ErrUnsupported }
