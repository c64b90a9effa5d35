//go:build !linux

package enclosure

import (
	"errors"
	"fmt"
)

// Inside is the child's part.
func Inside([]string) error { return fmt.Errorf("enclosure: needs Linux: %w", errors.ErrUnsupported) }
