package relay

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Watcher is a conn that is no socket of the kernel's and that notices its peer's reset by itself, though nobody reads or writes.
type Watcher interface {
	// Watch has failed called, once, when the conn fails: it was reset, or its peer has vanished. failed does not
	// block; it may be called before Watch returns. stop ends the watch.
	Watch(failed func()) (stop func())
	// Failure returns what the conn has failed with; nil if it has not.
	Failure() error
}

// queuer is a conn that can say what its peer does not have yet.
type queuer interface {
	// Unsent returns how many bytes were written and not acknowledged. ok is false where that is not known.
	Unsent() (n int, ok bool)
}

// lender is a conn that has what it received in memory of its own, and lends it instead of copying it.
type lender interface {
	// Lend waits for bytes and returns some, at least the first of them, and not many more than most. They are valid until
	// Return. An error comes without bytes: what Read would have returned.
	Lend(most int) ([][]byte, error)
	// Return is called after a Lend without an error: the first n bytes are used up. Close and Abort may come
	// between, and take effect now.
	Return(n int)
}

// lendSize is how much is borrowed at a time.
const lendSize = 256 << 10

// packer is a conn whose writes become packets.
type packer interface {
	// WriteSize returns how many bytes one Write takes best.
	WriteSize() int
}

// conn is a side of a pair under the portable engine: the conn and what it can do beyond
// io.ReadWriteCloser.
type conn struct {
	rwc    io.ReadWriteCloser
	below  below // the kernel's socket at the bottom; its zero value if there is none
	bare   bool  // rwc is the socket itself, so that its bytes are the stream's bytes
	ended  atomic.Bool
	closer sync.Once
	unhook func()
}

func newConn(c io.ReadWriteCloser) *conn {
	k := &conn{rwc: c, below: belowOf(c)}
	switch t := c.(type) {
	case *net.TCPConn:
		t.SetNoDelay(true)
		k.bare = k.below.raw != nil
	case *net.UnixConn:
		k.bare = k.below.raw != nil
	}
	k.clearDeadlines()
	return k
}

// clearDeadlines takes off what a handshake has left: the kernel's loop knows no deadlines, and a pair is to end in
// the same way under both engines.
func (c *conn) clearDeadlines() {
	var err error
	defer recoverInto(&err)
	if d, ok := c.rwc.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Time{})
	}
}

// watch calls failed, once, when the socket fails, whether or not somebody reads from it or writes to it.
func (c *conn) watch(failed func()) {
	if c.below.raw != nil {
		c.unhook = c.below.watch(failed)
	} else if w, ok := c.rwc.(Watcher); ok {
		c.unhook = w.Watch(failed)
	}
}

// failure returns the error of a socket that was seen to have failed. It may take the error away
// from a Read that follows; the machine knows by then that the side has failed.
func (c *conn) failure() error {
	if w, ok := c.rwc.(Watcher); ok && c.below.raw == nil {
		return w.Failure()
	}
	return c.below.failure()
}

// wasReset tells, after a Read has reported the end, whether that was the end of the stream. A
// reset shows itself once; if a Write on the other way has consumed it, Read sees an end.
// A socket that both sides have ended is as dead as one that was reset, so ended is looked at last:
// it is set before our own end is sent.
func (c *conn) wasReset() bool {
	return c.below.raw != nil && c.below.dead() && !c.ended.Load()
}

// unsent returns how many bytes are still held for the peer. ok is false where that cannot be known.
func (c *conn) unsent() (n int, ok bool) {
	if q, ok := c.rwc.(queuer); ok {
		return q.Unsent()
	}
	return c.below.unsent()
}

// stopReading frees a Read that waits, where the conn has deadlines.
func (c *conn) stopReading() {
	var err error
	defer recoverInto(&err)
	if d, ok := c.rwc.(interface{ SetReadDeadline(time.Time) error }); ok {
		d.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *conn) closeWrite() (err error) {
	defer recoverInto(&err)
	h, ok := c.rwc.(HalfCloser)
	if !ok {
		return ErrNoHalfClose
	}
	c.ended.Store(true)
	return h.CloseWrite()
}

func (c *conn) close() { c.closer.Do(c.closeOnce) }
func (c *conn) abort() { c.closer.Do(c.abortOnce) }

func (c *conn) closeOnce() {
	var err error
	defer recoverInto(&err)
	c.unwatch()
	c.rwc.Close()
}

func (c *conn) abortOnce() {
	var err error
	defer recoverInto(&err)
	c.unwatch()
	Abort(c.rwc)
}

func (c *conn) unwatch() {
	if c.unhook != nil {
		c.unhook()
	}
}

// The buffers: a small one waits for bytes where the platform cannot wait without one, and the
// large one moves them.
const (
	smallSize = 2 << 10
	largeSize = 64 << 10
)

var (
	smallBuffers = sync.Pool{New: newSmall}
	largeBuffers = sync.Pool{New: newLarge}
)

func newSmall() any { return new([smallSize]byte) }
func newLarge() any { return new([largeSize]byte) }

// reader reads from a conn and holds as little memory as it can while it waits.
type reader struct {
	c     *conn
	small *[smallSize]byte
	large *[largeSize]byte
	limit int // how much to read at most; 0: what there is
	n     int
	err   error
	try   func(fd uintptr) bool // rd.tryRead, made once
}

// newReader returns a reader of c for what will be written to dst.
func (c *conn) newReader(dst *conn) *reader {
	rd := &reader{c: c}
	if p, ok := dst.rwc.(packer); ok {
		rd.limit = p.WriteSize()
	}
	rd.try = rd.tryRead
	return rd
}

// release gives the buffers back.
func (rd *reader) release() {
	if rd.small != nil {
		smallBuffers.Put(rd.small)
		rd.small = nil
	}
	rd.releaseLarge()
}

func (rd *reader) releaseLarge() {
	if rd.large != nil {
		largeBuffers.Put(rd.large)
		rd.large = nil
	}
}

func (rd *reader) takeLarge() []byte {
	if rd.large == nil {
		rd.large = largeBuffers.Get().(*[largeSize]byte)
	}
	return rd.large[:]
}

// read waits for bytes and returns them; they are valid until the next read. An end is io.EOF.
func (rd *reader) read() ([]byte, error) {
	if rd.c.bare && canTryRead {
		return rd.readSocket()
	}
	if rd.large != nil { // the last read was a full one: there is more where it came from
		n, err := rd.c.rwc.Read(rd.cut(rd.large[:]))
		b := rd.large[:n]
		if n < smallSize && err == nil {
			// The next wait holds the small buffer; these bytes move there, so that the large one can go.
			b = rd.takeSmall()[:copy(rd.takeSmall(), b)]
			rd.releaseLarge()
		}
		return b, err
	}
	n, err := rd.c.rwc.Read(rd.cut(rd.takeSmall()))
	if n == smallSize {
		rd.takeLarge()
	}
	return rd.small[:n], err
}

// cut cuts a buffer to the limit.
func (rd *reader) cut(b []byte) []byte {
	if rd.limit > 0 && rd.limit < len(b) {
		return b[:rd.limit]
	}
	return b
}

func (rd *reader) takeSmall() []byte {
	if rd.small == nil {
		rd.small = smallBuffers.Get().(*[smallSize]byte)
	}
	return rd.small[:]
}

// readSocket waits in the netpoller, without a buffer.
func (rd *reader) readSocket() ([]byte, error) {
	rd.n, rd.err = 0, nil
	if err := rd.c.below.raw.Read(rd.try); err != nil {
		return nil, err
	}
	if rd.n == 0 {
		rd.releaseLarge()
		if rd.err == nil {
			return nil, io.EOF
		}
		return nil, rd.err
	}
	return rd.large[:rd.n], rd.err
}
