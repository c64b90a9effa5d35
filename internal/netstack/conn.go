package netstack

import (
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

// conn is a stream of the stack's, from its handshake on.
type conn struct {
	id    stack.TransportEndpointID
	ep    *tcp.Endpoint
	queue waiter.Queue
	entry waiter.Entry
	in    half
	out   half

	closed atomic.Bool
	ended  atomic.Bool // CloseWrite was called

	loan loan // in.mu is held for it

	mu     sync.Mutex
	failed func() // to be called when it fails
	cause  error  // what it failed with, once known
	lent   bool   // the endpoint's memory is being read: it must not be closed
	end    func() // closes the endpoint, to be called when nothing is lent any more
}

var (
	_ net.Conn         = (*conn)(nil)
	_ relay.HalfCloser = (*conn)(nil)
	_ relay.Aborter    = (*conn)(nil)
	_ relay.Watcher    = (*conn)(nil)
)

// half is a direction of a conn: who waits in it, and until when.
type half struct {
	mu    sync.Mutex    // held by the one who reads or writes
	ready chan struct{} // has a value when it is worth another try

	timing   sync.Mutex
	deadline time.Time
	timer    *time.Timer
}

// wake has the one who waits try again. It does not block.
func (h *half) wake() {
	select {
	case h.ready <- struct{}{}:
	default:
	}
}

// set sets the deadline.
func (h *half) set(t time.Time) {
	h.timing.Lock()
	defer h.timing.Unlock()
	h.deadline = t
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
	if t.IsZero() {
		return
	}
	if d := time.Until(t); d > 0 {
		h.timer = time.AfterFunc(d, h.wake)
	} else {
		h.wake()
	}
}

func (h *half) expired() bool {
	h.timing.Lock()
	defer h.timing.Unlock()
	return !h.deadline.IsZero() && !time.Now().Before(h.deadline)
}

func newConn(id stack.TransportEndpointID) *conn {
	c := &conn{id: id}
	c.in.ready, c.out.ready = make(chan struct{}, 1), make(chan struct{}, 1)
	return c
}

// begin is called when the handshake is done.
func (c *conn) begin(ep *tcp.Endpoint) {
	c.ep = ep
	o := ep.SocketOptions()
	o.SetDelayOption(false)
	o.SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(keepAlive), tcpip.KeepaliveIntervalOption(keepAlive)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	c.entry.Init(c, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	c.queue.EventRegister(&c.entry)
}

// NotifyEvent implements waiter.EventListener. It is called with locks of the endpoint's held.
func (c *conn) NotifyEvent(events waiter.EventMask) {
	if events&(waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.in.wake()
	}
	if events&(waiter.WritableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.out.wake()
	}
	if events&(waiter.EventHUp|waiter.EventErr) != 0 && c.isDead() {
		c.tell()
	}
}

// isDead says that the stream has ended otherwise than by the ends of both sides. A reset after the peer's end shows
// as a close before our own end.
func (c *conn) isDead() bool {
	switch c.ep.EndpointState() {
	case tcp.StateError:
		return true
	case tcp.StateClose:
		return !c.ended.Load()
	}
	return false
}

// tell calls failed, once.
func (c *conn) tell() {
	c.mu.Lock()
	failed := c.failed
	c.failed = nil
	c.mu.Unlock()
	if failed != nil {
		failed()
	}
}

// Watch implements relay.Watcher.
func (c *conn) Watch(failed func()) (stop func()) {
	c.mu.Lock()
	c.failed = failed
	c.mu.Unlock()
	if c.isDead() {
		c.tell()
	}
	return c.unwatch
}

func (c *conn) unwatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = nil
}

// Failure implements relay.Watcher.
func (c *conn) Failure() error {
	if c.closed.Load() || !c.isDead() {
		return nil
	}
	return c.broken(nil)
}

// broken returns what the stream failed with. The endpoint says it once: to any of Read, Write and LastError.
func (c *conn) broken(err tcpip.Error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return c.cause
	}
	switch err.(type) {
	case nil, *tcpip.ErrClosedForReceive, *tcpip.ErrClosedForSend:
		err = c.ep.LastError()
	}
	if err == nil {
		return syscall.ECONNRESET // said to another, who is about to note it
	}
	c.cause = errnoOf(err)
	return c.cause
}

// check returns an error where h is not to be used.
func (c *conn) check(h *half) error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case h.expired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	for {
		if err := c.check(&c.in); err != nil {
			return 0, c.opError("read", err)
		}
		if len(p) == 0 {
			return 0, nil
		}
		w := tcpip.SliceWriter(p)
		res, err := c.ep.Read(&w, tcpip.ReadOptions{})
		switch err.(type) {
		case nil:
			c.ep.ModerateRecvBuf(res.Count)
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			<-c.in.ready
		case *tcpip.ErrClosedForReceive:
			if !c.isDead() {
				return 0, io.EOF
			}
			return 0, c.readError(err)
		default:
			return 0, c.readError(err)
		}
	}
}

func (c *conn) readError(err tcpip.Error) error {
	if c.closed.Load() {
		return c.opError("read", net.ErrClosed)
	}
	return c.opError("read", c.broken(err))
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (n int, err error) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	rest := payload{b: p}
	for {
		if err := c.check(&c.out); err != nil {
			return n, c.opError("write", err)
		}
		if len(rest.b) == 0 {
			return n, nil
		}
		whole := rest.b
		m, err := c.ep.Write(&rest, tcpip.WriteOptions{})
		n += int(m)
		rest.b = whole[m:] // what was read and not taken is to be read again
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			<-c.out.ready
		case *tcpip.ErrClosedForSend:
			if c.isDead() {
				return n, c.writeError(err)
			}
			return n, c.opError("write", syscall.EPIPE)
		default:
			return n, c.writeError(err)
		}
	}
}

func (c *conn) writeError(err tcpip.Error) error {
	if c.closed.Load() {
		return c.opError("write", net.ErrClosed)
	}
	return c.opError("write", c.broken(err))
}

// WriteSize tells the relay to write what fits one packet.
func (c *conn) WriteSize() int { return writeSize }

// writeSize is what gVisor sends at once of a link of 64 KiB: packets without the largest headers there are.
const writeSize = tundev.PacketMax - header.TCPTotalHeaderMaximumSize - 1

// payload is a tcpip.Payloader of bytes.
type payload struct{ b []byte }

func (p *payload) Len() int { return len(p.b) }

func (p *payload) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}

// CloseWrite implements relay.HalfCloser.
func (c *conn) CloseWrite() error {
	if c.closed.Load() {
		return c.opError("shutdown", net.ErrClosed)
	}
	if c.isDead() {
		return c.opError("shutdown", c.broken(nil))
	}
	c.ended.Store(true)
	if err := c.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		c.ended.Store(false)
		return c.opError("shutdown", errnoOf(err))
	}
	return nil
}

// Unsent returns how many bytes the peer has not acknowledged, and may never get.
func (c *conn) Unsent() (n int, ok bool) {
	c.ep.LockUser()
	defer c.ep.UnlockUser()
	return unsentOf(c.ep)
}

// unsentOf reads how full the endpoint's send queue is, which gVisor tells nobody. The endpoint is locked.
func unsentOf(ep *tcp.Endpoint) (n int, ok bool) {
	v := reflect.ValueOf(ep).Elem().FieldByName("sndQueueInfo")
	if v.IsValid() {
		v = v.FieldByName("SndBufUsed")
	}
	if !v.IsValid() || !v.CanInt() {
		return 0, false
	}
	return int(v.Int()), true
}

// Close implements net.Conn. What was written is still sent, and then the end.
func (c *conn) Close() error { return c.endBy(c.ep.Close) }

// Abort implements relay.Aborter: it resets the stream.
func (c *conn) Abort() error { return c.endBy(c.reset) }

func (c *conn) reset() {
	c.ep.Abort()
	c.ep.Close()
}

// endBy ends the conn by end, at once or when nothing is lent any more.
func (c *conn) endBy(end func()) error {
	if c.closed.Swap(true) {
		return c.opError("close", net.ErrClosed)
	}
	c.mu.Lock()
	if c.lent {
		c.end, end = end, nil
	}
	c.mu.Unlock()
	if end != nil {
		end()
	}
	c.release()
	return nil
}

func (c *conn) release() {
	c.unwatch()
	c.queue.EventUnregister(&c.entry)
	c.in.set(time.Time{})
	c.out.set(time.Time{})
	c.in.wake()
	c.out.wake()
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", net.ErrClosed)
	}
	c.in.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", net.ErrClosed)
	}
	c.out.set(t)
	return nil
}

// LocalAddr implements net.Conn: it is where the client wanted to go.
func (c *conn) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(addrPort(c.id.LocalAddress, c.id.LocalPort))
}

// RemoteAddr implements net.Conn: it is the client.
func (c *conn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(addrPort(c.id.RemoteAddress, c.id.RemotePort))
}

func (c *conn) opError(op string, err error) error {
	if errno, ok := err.(syscall.Errno); ok {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
