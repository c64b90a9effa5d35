package relaytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// end is one end of a relayed connection, with what scenarios do to it. Its errors name it.
type end struct {
	net.Conn
	t      *trial
	name   string
	caps   Caps
	number int             // of the connection within the trial
	tcp    *net.TCPConn    // beneath TLS too; nil if there is none
	sock   syscall.RawConn // the socket beneath; nil if there is none
	once   sync.Once
	gone   atomic.Bool // it has closed, or has been reset
}

// beneath returns what c is above of, as TLS is of TCP.
func beneath(c net.Conn) net.Conn {
	for {
		above, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = above.NetConn()
	}
}

// breakOff resets c, if it can be reset, and closes it.
func breakOff(c net.Conn) {
	if a, ok := c.(interface{ Abort() error }); ok {
		a.Abort()
		return
	}
	if tcp, ok := beneath(c).(*net.TCPConn); ok {
		tcp.SetLinger(0)
		tcp.Close() // not the conn above it, which might say goodbye
	}
	c.Close()
}

func newEnd(t *trial, name string, c net.Conn, caps Caps) *end {
	e := &end{Conn: c, t: t, name: name, caps: caps}
	c = beneath(c)
	e.tcp, _ = c.(*net.TCPConn)
	if s, ok := c.(syscall.Conn); ok {
		e.sock, _ = s.SyscallConn()
	}
	return e
}

func (e *end) errorf(format string, args ...any) error {
	return fmt.Errorf(e.name+" "+format, args...)
}

// Read implements [io.Reader].
func (e *end) Read(b []byte) (int, error) {
	n, err := e.Conn.Read(b)
	e.saw(n, err)
	return n, err
}

// Write implements [io.Writer].
func (e *end) Write(b []byte) (int, error) {
	begun := time.Now()
	n, err := e.Conn.Write(b)
	e.wrote(begun, n, err)
	return n, err
}

// Close implements [io.Closer].
func (e *end) Close() error {
	e.left(Closed)
	return e.Conn.Close()
}

func (e *end) can(c Caps) bool { return e.caps&c == c }

func (e *end) send(b []byte) error {
	if _, err := e.Write(b); err != nil {
		return e.errorf("could not send %d bytes: %w", len(b), err)
	}
	return nil
}

// expect reads want, and no more than that.
func (e *end) expect(want string, within time.Duration) error {
	got := make([]byte, len(want))
	e.SetReadDeadline(time.Now().Add(within))
	defer e.SetReadDeadline(time.Time{})
	n, err := io.ReadFull(e, got)
	switch {
	case !bytes.Equal(got[:n], []byte(want)[:n]):
		return e.errorf("read %.40q instead of %.40q", got[:n], want)
	case isTimeout(err):
		return e.errorf("got %d of %d bytes in %v: %w", n, len(want), within, err)
	case err != nil:
		return e.errorf("got %d of %d bytes, then: %w", n, len(want), err)
	}
	return nil
}

// expectEnd reads the end of the stream, which must be clean.
func (e *end) expectEnd(within time.Duration) error {
	e.SetReadDeadline(time.Now().Add(within))
	defer e.SetReadDeadline(time.Time{})
	var b [1]byte
	n, err := io.ReadFull(e, b[:])
	switch {
	case n > 0:
		return e.errorf("read %q where the stream should end", b[:n])
	case err == io.EOF:
		return nil
	case isTimeout(err):
		return e.errorf("was not told of the end of the stream in %v", within)
	}
	return e.errorf("saw no clean end, but: %w", err)
}

// expectBroken reads and drops what is left: after it must come an error that is not a clean end.
// Where the leg has no such thing, a clean end will do.
func (e *end) expectBroken(within time.Duration) error {
	e.SetReadDeadline(time.Now().Add(within))
	defer e.SetReadDeadline(time.Time{})
	_, err := io.Copy(io.Discard, struct{ io.Reader }{e})
	switch {
	case err == nil && e.can(Reset):
		return e.errorf("saw a clean end where the connection was reset")
	case isTimeout(err):
		return e.errorf("was not told of the reset in %v", within)
	}
	return nil
}

// awaitBroken waits for the connection to be broken, and does not read from it.
func (e *end) awaitBroken(within time.Duration) error {
	limit := time.Now().Add(within)
	for !e.broken() {
		if time.Now().After(limit) {
			e.event(SawNothing, 0, "")
			return e.errorf("was not told of the reset in %v", within)
		}
		time.Sleep(2 * time.Millisecond)
	}
	e.event(SawReset, 0, "noticed without a read")
	return nil
}

func (e *end) broken() bool {
	if b, ok := e.Conn.(interface{ broken() bool }); ok {
		return b.broken()
	}
	isErr, isHup := sockState(e.sock)
	return isErr || isHup && !e.can(Reset)
}

// expectWritesFail writes now and then until that fails, as it must once nobody can read it.
func (e *end) expectWritesFail(within time.Duration) error {
	limit := time.Now().Add(within)
	for {
		e.SetWriteDeadline(limit)
		if _, err := e.Write([]byte("x")); err != nil {
			if isTimeout(err) {
				return e.errorf("was not told in %v that nobody reads what it writes", within)
			}
			return nil
		}
		if time.Now().After(limit) {
			return e.errorf("still writes %v after nobody can read it", within)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (e *end) closeWrite() error {
	h, ok := e.Conn.(interface{ CloseWrite() error })
	if !ok {
		return e.errorf("is a %T, which cannot half-close", e.Conn)
	}
	e.event(HalfClosed, 0, "")
	if err := h.CloseWrite(); err != nil {
		return e.errorf("could not half-close: %w", err)
	}
	return nil
}

// reset breaks the connection off. What the end has sent is lost unless it was taken before.
func (e *end) reset() error {
	e.left(WasReset)
	if a, ok := e.Conn.(interface{ Abort() error }); ok {
		return a.Abort()
	}
	if e.tcp == nil {
		return e.errorf("is a %T, which cannot be reset", e.Conn)
	}
	e.tcp.SetLinger(0)
	return e.tcp.Close() // not the conn above it, which might say goodbye
}

// leave resets where the leg can and closes where it cannot.
func (e *end) leave() {
	if !e.can(Reset) || e.reset() != nil {
		e.Close()
	}
}

// drop closes the end, by whatever is left of it.
func (e *end) drop() {
	e.once.Do(func() {
		if e.tcp != nil && e.Conn != net.Conn(e.tcp) {
			e.tcp.SetDeadline(time.Now()) // a goodbye must not wait for a reader that stalls
		}
		e.gone.Store(true) // an event of the scenario's, not of its end
		e.Conn.Close()
	})
}

// taken waits until the other side's kernel has all that was sent, so that a reset cannot lose it.
func (e *end) taken() error {
	for e.sock != nil && e.t.ctx.Err() == nil {
		n, err := unsent(e.sock)
		if err != nil {
			return e.errorf("cannot see its send queue: %w", err)
		}
		if n == 0 {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)
}

// pattern is an endless stream of bytes that two ends can make alike.
type pattern struct{ *rand.ChaCha8 }

func newPattern(seed byte) pattern { return pattern{rand.NewChaCha8([32]byte{seed})} }

// pour sends the first n bytes of a pattern, in writes of all sizes.
func (e *end) pour(seed byte, n int64) error {
	p, buf := newPattern(seed), make([]byte, 128<<10)
	for i, left := 0, n; left > 0; i++ {
		b := buf[:min(left, int64(1+(i*7919)%len(buf)))]
		p.Read(b)
		if _, err := e.Write(b); err != nil {
			return e.errorf("could send %d of %d bytes: %w", n-left, n, err)
		}
		left -= int64(len(b))
	}
	return nil
}

// drain reads n bytes of a pattern, or until the first error if n is negative, and returns how many
// came. The error is of the end's Read, or says where the bytes were wrong.
func (e *end) drain(seed byte, n int64) (int64, error) {
	p := newPattern(seed)
	buf, want := make([]byte, 64<<10), make([]byte, 64<<10)
	var got int64
	for got != n {
		b := buf
		if n > 0 {
			b = buf[:min(n-got, int64(len(buf)))]
		}
		m, err := e.Read(b)
		p.Read(want[:m])
		if !bytes.Equal(b[:m], want[:m]) {
			return got, e.errorf("read wrong bytes after the first %d", got)
		}
		got += int64(m)
		if err != nil && got != n {
			return got, err
		}
	}
	return got, nil
}

// sink reads n bytes of a pattern and nothing else.
func (e *end) sink(seed byte, n int64) error {
	if got, err := e.drain(seed, n); err != nil {
		return e.errorf("got %d of %d bytes, then: %w", got, n, err)
	}
	return nil
}

// flood is a writer that goes on until it is stopped, or its conn is.
type flood struct {
	e       *end
	sent    atomic.Int64 // by writes that have returned
	stopped atomic.Bool
	done    chan struct{}
	err     error // after done
}

// flood starts to send a pattern without end.
func (e *end) flood(seed byte) *flood {
	f := &flood{e: e, done: make(chan struct{})}
	e.t.background.Go(func() { f.run(seed) })
	return f
}

func (f *flood) run(seed byte) {
	defer close(f.done)
	p, buf := newPattern(seed), make([]byte, 64<<10)
	for !f.stopped.Load() {
		p.Read(buf)
		n, err := f.e.Write(buf)
		f.sent.Add(int64(n))
		if err != nil {
			f.err = err
			return
		}
	}
}

// still is how long a writer that is stuck has not moved. A loaded machine can make a writer look
// stuck that is only slow, so that what depends on it uses whileStuck, or takes longer.
const still = 250 * time.Millisecond

// blocked waits until the writer is stuck, which it must be before it has sent limit bytes.
func (f *flood) blocked(limit int64, still time.Duration) error {
	last, since := f.sent.Load(), time.Now()
	for time.Since(since) < still {
		select {
		case <-f.done:
			return f.e.errorf("could not go on sending to an end that does not read: %w", f.err)
		case <-time.After(10 * time.Millisecond):
		}
		n := f.sent.Load()
		if n > limit {
			return f.e.errorf("could send %d MiB that nobody reads", n>>20)
		}
		if n != last {
			last, since = n, time.Now()
		}
	}
	return nil
}

// stuck is how much a writer may send before it is stuck, where it is not the amount that matters.
func (t *trial) stuck() int64 { return 4 * t.Held }

// whileStuck plays what must work while the writer is stuck, and again if it was only slow.
func (f *flood) whileStuck(play func() error) error {
	for i := range 5 {
		if err := f.blocked(f.e.t.stuck(), still<<i); err != nil {
			return err
		}
		n := f.sent.Load()
		if err := play(); err != nil || f.sent.Load() == n {
			return err
		}
	}
	return nil
}

// begun waits until the writer has sent n bytes, or has had the time for them.
func (f *flood) begun(n int64) {
	for start := time.Now(); f.sent.Load() < n && time.Since(start) < still/2; {
		time.Sleep(5 * time.Millisecond)
	}
}

// failed waits for the writer's conn to fail.
func (f *flood) failed(within time.Duration) error {
	select {
	case <-f.done:
		return nil
	case <-time.After(within):
		return f.e.errorf("was not told in %v that nobody reads what it sends", within)
	}
}

// finish lets the writer go on until it has sent n bytes, and half-closes.
func (f *flood) finish(n int64) error {
	for f.sent.Load() < n {
		select {
		case <-f.done:
			return f.e.errorf("could not go on sending to a reader that had stalled: %w", f.err)
		case <-time.After(time.Millisecond):
		}
	}
	f.stopped.Store(true)
	<-f.done
	if f.err != nil {
		return f.e.errorf("could not go on sending to a reader that had stalled: %w", f.err)
	}
	return f.e.closeWrite()
}
