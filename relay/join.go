package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

var (
	errInvalidWrite = errors.New("relay: conn's Write returned an impossible count")
	errReset        = fmt.Errorf("relay: %w", syscall.ECONNRESET)
)

// Join relays between a and b until both directions have ended, and closes both. Bytes and ends
// are passed on by the rules of the package doc.
//
// Join blocks until the pair is over and everything it started is gone. It needs Close to free
// a Read and a Write that wait, as Close of every net.Conn does. Cancelling ctx aborts both conns, after
// [Relay.Grace]. st may be nil.
//
// A net.TCPConn or net.UnixConn is taken over whole: from the call on it must not be used, not even
// for its addresses, and no Read or Write of the caller's may still wait in it. Deadlines that were set before
// do not count; they are taken off. To limit a pair's whole life, give ctx a deadline.
func (r *Relay) Join(ctx context.Context, a, b io.ReadWriteCloser, st *Stats) Result {
	st, a, b, heads := prepare(st, a, b)
	over := make(chan Result, 1)
	return r.await(ctx, r.start(st, a, b, heads, func(res Result) { over <- res }), over)
}

// start joins what prepare has prepared.
func (r *Relay) start(st *Stats, a, b io.ReadWriteCloser, heads [2][]byte, done func(Result)) *Pair {
	if p, handled := startKernel(r, st, a, b, heads, done); handled {
		return p
	}
	return newPair(r, st, a, b, heads, done).begin()
}

// await returns the pair's result, and aborts the pair once ctx and then the grace have ended.
func (r *Relay) await(ctx context.Context, p *Pair, over <-chan Result) Result {
	select {
	case res := <-over:
		return res
	case <-ctx.Done():
	}
	if r.Grace > 0 {
		grace := time.NewTimer(r.Grace)
		defer grace.Stop()
		select {
		case res := <-over:
			return res
		case <-grace.C:
		}
	}
	p.Abort(context.Cause(ctx))
	return <-over
}

// Start is Join that does not wait: the pair goes on by itself, and done is called once it is over,
// from a goroutine of the relay's, and maybe before Start has returned; done must not block: under the Kernel engine it
// holds up other pairs. st and done may be nil. What Join says of the conns holds here, too.
// Under the Kernel engine a started pair has no goroutine.
func (r *Relay) Start(a, b io.ReadWriteCloser, st *Stats, done func(Result)) *Pair {
	st, a, b, heads := prepare(st, a, b)
	return r.start(st, a, b, heads, done)
}

// Pair is a pair that [Relay.Start] has joined.
type Pair struct {
	engine interface{ abortPair(cause error) }
}

// Abort ends the pair as cancelling Join's context with that cause does, without grace. It does
// not wait, and does nothing once the pair is over. A nil cause is [context.Canceled].
func (p *Pair) Abort(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	p.engine.abortPair(cause)
}

// prepare fills in what the caller left out and takes transparent wrappers off.
func prepare(st *Stats, a, b io.ReadWriteCloser) (*Stats, io.ReadWriteCloser, io.ReadWriteCloser, [2][]byte) {
	if st == nil {
		st = new(Stats)
	}
	a, headA := unwrap(a)
	b, headB := unwrap(b)
	return st, become(a), become(b), [2][]byte{headA, headB}
}

// lengthMax keeps a limit's end within the range of time.
const lengthMax = 100 * 365 * 24 * time.Hour

// length returns the length of a limit; none for 0 or less.
func (r *Relay) length(l limit) time.Duration {
	idle, half := min(r.Idle, lengthMax), min(r.HalfOpen, lengthMax)
	if idle == 0 {
		idle = DefaultIdle
	}
	if half == 0 {
		half = DefaultHalfOpen
	}
	switch l {
	case limitIdle:
		return idle
	case limitHalfOpen: // a half-closed pair does not outlive an open one
		if idle > 0 && (half <= 0 || idle < half) {
			return idle
		}
		return half
	case limitSettle:
		return settle
	}
	return 0
}

// unwrap takes off all wrappers that say they are transparent.
func unwrap(c io.ReadWriteCloser) (io.ReadWriteCloser, []byte) {
	var head []byte
	for {
		t, ok := c.(Transparent)
		if !ok {
			return c, head
		}
		inner, h := t.Unwrap()
		if len(head) == 0 {
			head = h
		} else { // what the outer one holds was read from the inner one first
			head = append(head[:len(head):len(head)], h...)
		}
		c = inner
	}
}

// Abort closes c so that its peer cannot take it for a clean end: a TCP conn, also below TLS or a
// [Transparent] wrapper, is reset (its unsent bytes are discarded), an [Aborter] does it its own way, and
// anything else is closed.
func Abort(c io.Closer) error {
	for {
		switch t := c.(type) {
		case Aborter:
			return t.Abort()
		case *net.TCPConn:
			t.SetLinger(0) // fails only where the conn is closed already
			return t.Close()
		case *tls.Conn:
			c = t.NetConn() // without a close_notify
		case Transparent:
			c, _ = t.Unwrap()
		default:
			return c.Close()
		}
	}
}
