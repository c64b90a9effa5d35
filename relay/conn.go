package relay

import (
	"io"
	"net"
)

// HalfCloser is a conn that can end its outgoing bytes and still read.
// [net.TCPConn], [net.UnixConn] and [crypto/tls.Conn] are HalfClosers.
type HalfCloser interface {
	// CloseWrite passes the end of the stream (a FIN, a close_notify, a channel EOF) to the peer.
	CloseWrite() error
}

// Aborter is a conn that can end in a way that its peer cannot take for a clean end:
// a TCP reset, a stream reset. For [net.TCPConn], and for TLS over it, Join needs no Aborter.
type Aborter interface {
	// Abort discards what is unsent, resets the stream and releases the conn.
	// It takes the place of Close.
	Abort() error
}

// Transparent is a conn that wraps another and changes no byte of it: it may have read ahead,
// and nothing more. Join relays the conn beneath, so that a wrapper does not cost the fast path.
// A conn that counts, limits, encrypts or otherwise has to see the bytes must not implement it.
type Transparent interface {
	// Unwrap returns the conn beneath and the bytes that were read from it and not yet returned
	// by Read; they precede what conn yields. The wrapper must not be used afterwards.
	Unwrap() (conn io.ReadWriteCloser, head []byte)
}

// WithHead returns c as a conn whose Read first yields head: the bytes that a handshake has read
// too many. It is [Transparent]: Join passes head on and then relays c itself. c is returned as
// it is where head is empty. Closing the result closes c. head is not copied.
func WithHead(c net.Conn, head []byte) net.Conn {
	if len(head) == 0 {
		return c
	}
	return &headConn{Conn: c, head: head}
}

type headConn struct {
	net.Conn
	head []byte
}

func (c *headConn) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *headConn) Unwrap() (io.ReadWriteCloser, []byte) { return c.Conn, c.head }

// CloseWrite half-closes the conn beneath; where that cannot half-close, it reports so.
func (c *headConn) CloseWrite() error {
	if h, ok := c.Conn.(HalfCloser); ok {
		return h.CloseWrite()
	}
	return ErrNoHalfClose
}
