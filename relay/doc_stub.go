package relay

import (
	"context"
	"io"
	"net"
)

func (r *Relay) Join(ctx context.Context, a, b io.ReadWriteCloser, st *Stats) Result { panic("soon") }

// ResetContext returns a context that is also cancelled when c is reset.
func ResetContext(ctx context.Context, c io.ReadWriteCloser) (context.Context, context.CancelFunc) {
	return context.WithCancel(ctx)
}

// Abort closes c so that its peer sees a reset, where c's transport has one, and not a clean end.
func Abort(c io.Closer) error {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	return c.Close()
}
