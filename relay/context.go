package relay

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ResetContext returns a copy of ctx that is also cancelled when c is reset or its peer has
// vanished. Use it while an answer for c is prepared, such as a dial: a client that resets its
// conn wants the answer no more. One that half-closes, or sends more, still does, and does not
// cancel. c is neither read nor written.
//
// The cause of the cancellation is ECONNRESET. Call the CancelFunc before c is used in any other way.
// A reset is noticed within some milliseconds, on Linux and for TCP and Unix sockets, also below TLS, and for a [Watcher]; elsewhere
// the context is only what ctx is.
func ResetContext(ctx context.Context, c io.ReadWriteCloser) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	s := belowOf(c)
	w := &resetWatch{watch: s.watch, cancel: cancel}
	if s.raw == nil {
		watcher, ok := c.(Watcher)
		if !ok {
			return ctx, func() { cancel(nil) }
		}
		w.watch = watcher.Watch
	}
	w.timer = time.AfterFunc(watchDelay, w.begin)
	return ctx, w.end
}

// watchDelay spares the watch where the answer comes at once.
const watchDelay = 20 * time.Millisecond

type resetWatch struct {
	watch  func(failed func()) (unwatch func())
	cancel context.CancelCauseFunc
	timer  *time.Timer

	mu      sync.Mutex
	ended   bool
	unwatch func()
}

func (w *resetWatch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.unwatch = w.watch(w.reset)
	}
}

func (w *resetWatch) reset() { w.cancel(errReset) }

func (w *resetWatch) end() {
	w.timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unwatch != nil && !w.ended {
		w.unwatch()
	}
	w.ended = true
	w.cancel(nil)
}

// belowOf returns the kernel's socket below c, through TLS and wrappers that say they are transparent.
func belowOf(c any) below {
	for {
		switch t := c.(type) { // exactly these: a wrapper that embeds one may see and change bytes
		case *net.TCPConn:
			return newBelow(t, true)
		case *net.UnixConn:
			return newBelow(t, false)
		case *Socket:
			return t.below()
		case *tls.Conn:
			c = t.NetConn()
		case *headConn:
			c = t.Conn
		default:
			return below{}
		}
	}
}

// recoverInto makes a panic an error.
func recoverInto(err *error) {
	if v := recover(); v != nil {
		*err = fmt.Errorf("%w: %v", ErrPanic, v)
	}
}
