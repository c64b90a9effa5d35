//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package sockopt

import (
	"errors"
	"fmt"
)

func setReusePort(int) error {
	return fmt.Errorf("this system has no ports that several processes share: %w", errors.ErrUnsupported)
}
