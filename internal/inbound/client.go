package inbound

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// bare lets client embed a net.Conn and still have a method of the name Conn.
type bare = net.Conn

// client is an accepted conn. A protocol's Pending embeds *client, which has Conn and Done, and adds
// Accept and Reject. Its Read reads the conn, not head: a protocol reads from reader.
type client struct {
	bare        // the accepted conn itself; its deadlines are those of the handshake
	head []byte // read from the conn and not yet consumed: it precedes what the conn yields

	l           *Listener
	peer, local netip.AddrPort // as far as we see; a PROXY header changes them
	done        atomic.Bool
}

// Conn returns the bare conn, to be watched or, by Accept, to be given away.
func (c *client) Conn() net.Conn { return c.bare }

// give gives the bare conn away, for as long as the session lasts: nothing of it is kept here.
func (c *client) give() net.Conn {
	conn := c.bare
	c.bare = nil
	return conn
}

// reader returns a reader of head and then of the conn. What is left of head after its last Read
// is in c.head.
func (c *client) reader() io.Reader { return (*clientReader)(c) }

type clientReader client

func (r *clientReader) Read(p []byte) (int, error) {
	if len(r.head) > 0 {
		n := copy(p, r.head)
		if r.head = r.head[n:]; len(r.head) == 0 {
			r.head = nil // its array is not needed for as long as the session lasts
		}
		return n, nil
	}
	return r.bare.Read(p)
}

// flow returns the flow of c to dst.
func (c *client) flow(dst proxy.Addr, user string) proxy.Flow {
	return proxy.Flow{Inbound: c.l.Name, Client: c.peer, Local: c.local, User: user, Dst: dst}
}

// handshook ends the handshake: the conn has no deadline any more, and the listener's Close leaves
// it alone. It fails where the listener was closed before; then the client is to fail.
func (c *client) handshook() error {
	s := c.l.s
	if s.silent {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shaking == nil {
		return errStopping
	}
	delete(s.shaking, c)
	return c.SetDeadline(time.Time{})
}

var errStopping = &stoppingError{}

type stoppingError struct{}

func (*stoppingError) Error() string        { return "inbound: the listener was closed" }
func (*stoppingError) Is(target error) bool { return target == net.ErrClosed }

// Done ends the client's session: its slot is free, and serve need not wait for it. It does not
// close the conn, which Accept has given away.
func (c *client) Done() {
	if c.done.Swap(true) {
		return // a panic came between
	}
	s := c.l.s
	if !s.silent {
		s.mu.Lock()
		delete(s.shaking, c)
		s.mu.Unlock()
	}
	s.finish()
}

// Release implements [proxy.Releaser]: the client's session has begun, and only the listener is told of its end.
func (c *client) Release() (done func()) {
	c.done.Store(true)
	return c.l.s.done
}

// fail ends a client whose handshake failed: it logs err, closes the conn and calls Done. The
// protocol has written its answer before, if it has one for err.
func (c *client) fail(err error) {
	level := slog.LevelInfo
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		level = slog.LevelDebug // somebody looked whether the port is open; we are stopping
	}
	c.l.s.stranger(level, "handshake failed",
		"client", c.peer, "reason", proxy.ReasonOf(err), "err", err)
	if proxy.ReasonOf(err) == proxy.Reset || errors.Is(err, net.ErrClosed) {
		c.Close()
	} else {
		c.hangUp()
	}
	c.Done()
}

// The limits of hangUp.
const (
	hangUpTime  = 500 * time.Millisecond
	hangUpBytes = 256 << 10
)

// hangUp closes the conn such that what was written last can arrive: a close with bytes unread is a
// reset, which may overtake them (RFC 9112 section 9.6). So it half-closes, and reads on for a
// short while.
func (c *client) hangUp() {
	defer c.Close()
	if h, ok := c.bare.(relay.HalfCloser); !ok || h.CloseWrite() != nil {
		return
	}
	c.SetReadDeadline(time.Now().Add(hangUpTime))
	io.CopyN(io.Discard, c.bare, hangUpBytes)
}

// abort closes the conn with a reset, if it has not been given away.
func (c *client) abort() {
	if c.bare != nil {
		relay.Abort(c.bare)
	}
}

// addrPort returns a's IP address and port, IPv4 as such; zero for a Unix socket.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok || t == nil {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
