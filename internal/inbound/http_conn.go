package inbound

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// oneConn is a listener with one conn, and the server that serves it. Accept returns the conn, and
// then nothing until the conn is of no more interest to the server.
type oneConn struct {
	conn     net.Conn // nil once accepted
	server   http.Server
	stopping <-chan struct{} // the inbound's listener is closed: no request after the present one
	once     sync.Once
	done     chan struct{}
}

// Accept returns the conn once, and net.ErrClosed after its end.
func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	select {
	case <-l.done:
	case <-l.stopping:
		l.server.SetKeepAlivesEnabled(false) // closes the conn if it is idle
		<-l.done
	}
	return nil, net.ErrClosed
}

// Close does nothing: the listener is at its end when the conn is.
func (l *oneConn) Close() error { return nil }

// Addr returns the address the client has connected to.
func (l *oneConn) Addr() net.Addr { return nil }

// state is the server's ConnState.
func (l *oneConn) state(_ net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		l.end()
	}
}

func (l *oneConn) end() { l.once.Do(func() { close(l.done) }) }

// httpConn is the client's conn as net/http uses it. The data of a forwarded request is copied by
// net/http in any case, so that here nothing is lost by a wrapper.
//
// net/http takes the end of what a client sends for the client's leaving, and drops the request.
// But a client may half-close after its last request and wait for the answer. httpConn keeps such an end to
// itself for as long as the request is being answered, and sees to it that a client which has
// really left is still noticed: by a reset, or by the half-open limit.
type httpConn struct {
	net.Conn
	client *client
	lost   <-chan struct{} // closed when the client has reset the conn
	head   []byte          // read before, to be read again first

	interrupt chan struct{} // has a value after a deadline in the past
	wrote     atomic.Int64  // when anything was written last, in Unix nanoseconds
	broken    atomic.Bool   // the conn has failed, other than by a clean end, or has to look so
	taken     atomic.Bool   // from net/http, which has switched protocols
	spent     atomic.Bool   // content was left unread: no request can be read any more
}

// Read reads head and then the conn.
func (c *httpConn) Read(p []byte) (int, error) {
	if c.spent.Load() {
		return 0, io.EOF
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	n, err := c.Conn.Read(p)
	if err == io.EOF && len(p) == 1 && !c.taken.Load() {
		// net/http reads with a buffer of one byte to see whether the client is there, while the
		// handler runs, and with larger ones for all else.
		err = c.holdEnd()
	}
	if err != nil && err != io.EOF && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.broken.Store(true)
	}
	return n, err
}

// holdEnd waits, after the client's end, for the end of the request.
func (c *httpConn) holdEnd() error {
	since := time.Now().UnixNano()
	limit := time.NewTimer(relay.DefaultHalfOpen)
	defer limit.Stop()
	for {
		select {
		case <-c.interrupt:
			return os.ErrDeadlineExceeded
		case <-c.lost:
			return syscall.ECONNRESET
		case <-limit.C:
			silent := time.Duration(time.Now().UnixNano() - max(since, c.wrote.Load()))
			if silent >= relay.DefaultHalfOpen {
				return io.EOF
			}
			limit.Reset(relay.DefaultHalfOpen - silent)
		}
	}
}

// SetReadDeadline sets the conn's, and wakes a Read that waits without reading.
func (c *httpConn) SetReadDeadline(t time.Time) error {
	err := c.Conn.SetReadDeadline(t)
	if t.IsZero() {
		select {
		case <-c.interrupt:
		default:
		}
	} else if t.Before(time.Now()) {
		select {
		case c.interrupt <- struct{}{}:
		default:
		}
	}
	return err
}

func (c *httpConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.wrote.Store(time.Now().UnixNano())
	if err != nil {
		c.broken.Store(true)
	}
	return n, err
}

// CloseWrite half-closes the conn.
func (c *httpConn) CloseWrite() error {
	if h, ok := c.Conn.(relay.HalfCloser); ok {
		return h.CloseWrite()
	}
	return relay.ErrNoHalfClose
}

// Close ends the conn so that the last answer arrives, or with a reset if the conn is broken.
func (c *httpConn) Close() error {
	if c.broken.Load() {
		return relay.Abort(c.Conn)
	}
	c.client.hangUp()
	return nil
}

// httpWriter is the ResponseWriter of a forwarded request.
type httpWriter struct {
	http.ResponseWriter
	f *forwarding
}

// Unwrap lets http.ResponseController flush.
func (w *httpWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader keeps net/http from guessing a Content-Type that the origin has not said, and says to the client that
// this is the last answer where the listener is closed: net/http's server may learn of that only later.
func (w *httpWriter) WriteHeader(code int) {
	if _, ok := w.Header()["Content-Type"]; !ok && code >= 200 {
		w.Header()["Content-Type"] = nil
	}
	if code >= 200 && w.f.client.l.s.isClosed() {
		w.Header().Set("Connection", "close")
	}
	w.ResponseWriter.WriteHeader(code)
}

// Hijack takes the conn from net/http, with the bytes that were read too many put back.
func (w *httpWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if early, _ := rw.Reader.Peek(rw.Reader.Buffered()); len(early) > 0 {
		w.f.conn.head = append(append([]byte(nil), early...), w.f.conn.head...)
		rw.Reader.Reset(w.f.conn)
	}
	w.f.closeIdle() // there will be no more requests
	w.f.conn.taken.Store(true)
	return conn, rw, nil
}

// stream is one end of a stream in memory: what is written at one end is read at the other, and
// Write waits for that. It has no deadlines.
type stream struct {
	r *io.PipeReader
	w *io.PipeWriter
}

func newStream() (*stream, *stream) {
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	return &stream{r1, w2}, &stream{r2, w1}
}

func (s *stream) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s *stream) Write(p []byte) (int, error) { return s.w.Write(p) }

// CloseWrite ends what the other end reads.
func (s *stream) CloseWrite() error { return s.w.Close() }

// Close ends the stream both ways.
func (s *stream) Close() error {
	s.w.Close()
	return s.r.Close()
}

// Abort ends the stream such that both of the other end's directions fail like those of a conn that was reset.
func (s *stream) Abort() error {
	s.w.CloseWithError(syscall.ECONNRESET)
	return s.r.CloseWithError(syscall.ECONNRESET)
}

func (s *stream) LocalAddr() net.Addr              { return streamAddr{} }
func (s *stream) RemoteAddr() net.Addr             { return streamAddr{} }
func (s *stream) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (s *stream) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (s *stream) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type streamAddr struct{}

func (streamAddr) Network() string { return "memory" }
func (streamAddr) String() string  { return "memory" }

// originConn is net/http's end of a stream to an origin.
type originConn struct {
	*stream
	client *httpConn
}

// Read passes a reset on that ends an upgraded conn: there the two conns are one.
func (c *originConn) Read(p []byte) (int, error) {
	n, err := c.stream.Read(p)
	if err == syscall.ECONNRESET && c.client.taken.Load() {
		c.client.broken.Store(true)
	}
	return n, err
}

// Close aborts the stream where the client is gone with a reset: nobody has closed cleanly.
func (c *originConn) Close() error {
	if c.client.broken.Load() {
		return c.stream.Abort()
	}
	return c.stream.Close()
}
