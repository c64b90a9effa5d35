package sshlink

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Conn is a stream through a link: an SSH channel.
//
// A channel of x/crypto/ssh that is closed frees those who wait in its Read and Write only once the
// other end has agreed, which a server that cannot deliver its last bytes does not do. So goroutines
// of the conn wait there, and Close leaves them behind: they end when the server closes the channel,
// or with the connection.
//
// SSH has an end of stream in each direction, which is CloseWrite, and a close of both. It has no
// reset: Abort closes without the end of stream, and a server hands that on as a plain close. A reset
// at the far end arrives as an end of stream for the same reason: OpenSSH says nothing else of it.
type Conn struct {
	ch     ssh.Channel
	s      *session
	local  net.Addr
	remote net.Addr

	closed  chan struct{}
	once    sync.Once
	control chan control // to attend; holds all there can be
	gone    atomic.Bool  // the channel is closed, by its other end or with the connection

	reading  sync.Once
	in       chan []byte   // from pump
	turns    chan struct{} // to pump: how often it may read ahead
	rest     []byte        // what Read returns next, from taken on
	taken    int
	readErr  error // after in is closed
	writeMu  sync.Mutex
	writing  atomic.Bool
	ended    atomic.Bool // CloseWrite was called
	flushing sync.Once
	out      chan []byte // to flush
	wrote    chan written
	flushed  chan struct{} // closed when flush has ended
}

type control uint8

const (
	sendEOF control = iota
	sendClose
)

type written struct {
	n   int
	err error
}

func (s *session) newConn(ch ssh.Channel, requests <-chan *ssh.Request, local, remote net.Addr) *Conn {
	c := &Conn{
		ch: ch, s: s, local: local, remote: remote,
		closed:  make(chan struct{}),
		control: make(chan control, 2),
	}
	if s.begin() {
		go c.attend(requests)
	}
	return c
}

// attend sends what must not wait behind bytes, and refuses the requests that nobody expects.
func (c *Conn) attend(requests <-chan *ssh.Request) {
	defer c.s.all.Done()
	for {
		select {
		case r, ok := <-requests:
			if !ok {
				c.gone.Store(true)
				return
			}
			if r.WantReply {
				r.Reply(false, nil)
			}
		case what := <-c.control:
			if what == sendEOF {
				c.ch.CloseWrite()
			} else {
				c.ch.Close()
			}
		}
	}
}

// The buffers: a small one waits for bytes, and large ones move them.
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

func takeBuffer(large bool) []byte {
	if large {
		return largeBuffers.Get().(*[largeSize]byte)[:]
	}
	return smallBuffers.Get().(*[smallSize]byte)[:]
}

func putBuffer(b []byte) {
	if cap(b) == largeSize {
		largeBuffers.Put((*[largeSize]byte)(b[:largeSize]))
	} else {
		smallBuffers.Put((*[smallSize]byte)(b[:smallSize]))
	}
}

// pump reads ahead: one buffer is read into while the other is consumed.
func (c *Conn) pump() {
	defer c.s.all.Done()
	defer close(c.in)
	for full := false; c.turn(); {
		b := takeBuffer(full)
		n, err := c.ch.Read(b)
		full = n >= smallSize
		if n == 0 {
			putBuffer(b)
			c.turns <- struct{}{}
		} else if !c.handOver(b[:n]) {
			putBuffer(b)
			return
		}
		if err != nil {
			c.readErr = c.readError(err)
			return
		}
	}
}

// turn waits until pump may read ahead; false where nobody reads any more. Here and below, what needs
// no waiting is tried first: a select locks all its channels, and those of the link are many streams'.
func (c *Conn) turn() bool {
	select {
	case <-c.turns:
		return true
	default:
	}
	select {
	case <-c.turns:
		return true
	case <-c.closed:
	case <-c.s.link.ctx.Done():
		c.readErr = ErrClosed
	}
	return false
}

// handOver gives b to Read; false where nobody reads any more.
func (c *Conn) handOver(b []byte) bool {
	select {
	case c.in <- b:
		return true
	default:
	}
	select {
	case c.in <- b:
		return true
	case <-c.closed:
	case <-c.s.link.ctx.Done():
		c.readErr = ErrClosed
	}
	return false
}

// settle is how long the death of the connection may take to be known after its effect on a channel.
const settle = 2 * time.Millisecond

// readError says what the end of a channel's bytes was: an end of stream, or that of the connection.
// A wire that breaks is known to be dead before its channels end. Where the server said goodbye, or
// broke the protocol, they end an instant earlier, and closed; so a closed channel is looked at twice.
func (c *Conn) readError(err error) error {
	if err != io.EOF {
		return c.brokenBy(err)
	}
	if c.gone.Load() {
		select {
		case <-c.s.wire.dead:
		case <-time.After(settle):
		}
	}
	if c.s.wire.isDead() {
		return c.brokenBy(err)
	}
	return io.EOF
}

func (c *Conn) brokenBy(err error) error {
	if c.s.wire.isDead() {
		return &lostError{c.s.wire.err}
	}
	return err
}

// Read implements net.Conn. It is not for several goroutines at a time.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.reading.Do(c.startReading)
	if len(c.rest) == 0 {
		select {
		case <-c.closed: // also where there are bytes
			return 0, net.ErrClosed
		default:
		}
		select {
		case b, ok := <-c.in:
			if !ok {
				if c.readErr == nil {
					return 0, net.ErrClosed
				}
				return 0, c.readErr
			}
			c.rest = b
		case <-c.closed:
			return 0, net.ErrClosed
		}
	}
	n := copy(p, c.rest[c.taken:])
	if c.taken += n; c.taken == len(c.rest) {
		putBuffer(c.rest)
		c.taken = 0
		c.rest = nil
		c.turns <- struct{}{} // has room for all there are
	}
	return n, nil
}

func (c *Conn) startReading() {
	c.in, c.turns = make(chan []byte, 1), make(chan struct{}, 2)
	if !c.s.begin() {
		c.readErr = c.brokenBy(net.ErrClosed)
		close(c.in)
		return
	}
	c.turns <- struct{}{}
	c.turns <- struct{}{}
	go c.pump()
}

// Write implements net.Conn. It returns when the bytes are on their way to the server.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
	}
	if c.ended.Load() {
		return 0, syscall.EPIPE
	}
	c.flushing.Do(c.startWriting)
	for len(p) > 0 {
		b := takeBuffer(len(p) > smallSize)
		b = b[:copy(b, p)]
		c.writing.Store(true)
		select {
		case c.out <- b:
		case <-c.flushed: // nobody flushes any more
			putBuffer(b)
			return n, c.brokenBy(net.ErrClosed)
		case <-c.closed:
			putBuffer(b)
			return n, net.ErrClosed
		}
		select {
		case w := <-c.wrote:
			c.writing.Store(false)
			n += w.n
			p = p[w.n:]
			if w.err != nil {
				return n, w.err
			}
		case <-c.closed: // writing stays true
			return n, net.ErrClosed
		}
	}
	return n, nil
}

func (c *Conn) startWriting() {
	c.out, c.wrote = make(chan []byte), make(chan written, 1)
	c.flushed = make(chan struct{})
	if c.s.begin() {
		go c.flush()
	} else {
		close(c.flushed)
	}
}

// flush writes what Write hands over.
func (c *Conn) flush() {
	defer c.s.all.Done()
	defer close(c.flushed)
	for {
		select {
		case b := <-c.out:
			n, err := c.ch.Write(b)
			putBuffer(b)
			if err != nil {
				if err = c.brokenBy(err); err == io.EOF {
					err = syscall.EPIPE // the channel was closed
				}
			}
			c.wrote <- written{n, err}
		case <-c.s.over:
			return
		case <-c.closed:
			return
		}
	}
}

// CloseWrite implements relay.HalfCloser. It must not be called during a Write. It does not block.
func (c *Conn) CloseWrite() error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	if c.s.wire.isDead() {
		return c.brokenBy(nil)
	}
	if !c.ended.Swap(true) {
		c.control <- sendEOF
	}
	return nil
}

// Close ends the stream and frees Read and Write at once. It does not block, and may be called twice.
func (c *Conn) Close() error {
	c.once.Do(func() {
		if !c.writing.Load() && !c.ended.Swap(true) {
			c.control <- sendEOF
		}
		c.control <- sendClose
		close(c.closed)
	})
	return nil
}

// Abort is Close without an end of stream before it: the nearest to a reset that SSH has.
func (c *Conn) Abort() error {
	c.once.Do(func() {
		c.control <- sendClose
		close(c.closed)
	})
	return nil
}

// LocalAddr implements net.Conn. It is the local address of the connection to the server.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn. It is the address at the far end, which may hold a name.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// errNoDeadline is the answer to who wants one.
var errNoDeadline = errors.Join(os.ErrNoDeadline, errors.New("sshlink: an SSH channel has no deadlines"))

// SetDeadline implements net.Conn. SSH channels have no deadlines; it fails.
func (c *Conn) SetDeadline(time.Time) error { return errNoDeadline }

// SetReadDeadline implements net.Conn. It fails as SetDeadline does.
func (c *Conn) SetReadDeadline(time.Time) error { return errNoDeadline }

// SetWriteDeadline implements net.Conn. It fails as SetDeadline does.
func (c *Conn) SetWriteDeadline(time.Time) error { return errNoDeadline }

// Addr is an address at the far end of a link, as it was asked for.
type Addr struct{ Net, Address string }

// Network implements net.Addr.
func (a Addr) Network() string { return a.Net }

// String implements net.Addr.
func (a Addr) String() string { return a.Address }
