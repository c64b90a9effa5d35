package relaytest

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Stream is a stream in memory of the kind that SSH, HTTP/2 and QUIC have: it can half-close and be
// reset, it has a small buffer, and no deadlines. The relay gets an [io.ReadWriteCloser] with the
// methods CloseWrite and Abort. Its Read does all that [io.Reader] allows: it returns bytes
// together with the error that follows them, and now and then no byte and no error.
func Stream() Leg {
	return Leg{
		Name: "stream",
		Caps: HalfClose | Reset | Buffered,
		Pair: func(context.Context) (a, b net.Conn, err error) {
			x, y := newHalf(), newHalf()
			return &stream{in: x, out: y}, &stream{in: y, out: x}, nil
		},
		Relayed: func(c net.Conn) io.ReadWriteCloser { return bareStream{c.(*stream)} },
	}
}

type streamConn interface {
	io.ReadWriteCloser
	CloseWrite() error
	Abort() error
}

type bareStream struct{ streamConn }

// stream is one end of two halves.
type stream struct{ in, out *half }

// half carries bytes one way.
type half struct {
	mu          sync.Mutex
	changed     sync.Cond
	buf         []byte
	reads       int
	end         error // what the reader gets after buf: io.EOF or a reset
	deaf        bool  // the reader is gone
	readClosed  bool  // by its own Close
	writeClosed bool
	readBy      time.Time
	writeBy     time.Time
}

const streamWindow = 64 << 10

func newHalf() *half {
	h := new(half)
	h.changed.L = &h.mu
	return h
}

func (s *stream) Read(p []byte) (int, error) {
	h := s.in
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reads++; h.reads%7 == 0 {
		return 0, nil
	}
	for {
		switch {
		case h.readClosed:
			return 0, net.ErrClosed
		case len(h.buf) > 0:
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			h.changed.Broadcast()
			if len(h.buf) == 0 && h.end != nil {
				return n, h.end
			}
			return n, nil
		case h.end != nil:
			return 0, h.end
		case past(h.readBy):
			return 0, os.ErrDeadlineExceeded
		}
		h.changed.Wait()
	}
}

func (s *stream) Write(p []byte) (n int, err error) {
	h := s.out
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.writeClosed:
			return n, net.ErrClosed
		case h.deaf || h.end != nil:
			return n, syscall.EPIPE
		case n == len(p):
			return n, nil
		case past(h.writeBy):
			return n, os.ErrDeadlineExceeded
		}
		if room := streamWindow - len(h.buf); room > 0 {
			m := min(room, len(p)-n)
			h.buf = append(h.buf, p[n:n+m]...)
			n += m
			h.changed.Broadcast()
			continue
		}
		h.changed.Wait()
	}
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (h *half) update(f func()) {
	h.mu.Lock()
	f()
	h.changed.Broadcast()
	h.mu.Unlock()
}

func (h *half) finish(end error) {
	if h.end == nil {
		h.end = end
	}
}

// CloseWrite ends the outgoing bytes.
func (s *stream) CloseWrite() error {
	s.out.update(func() { s.out.finish(io.EOF) })
	return nil
}

// Close ends the outgoing bytes and stops reading.
func (s *stream) Close() error { return s.shut(io.EOF) }

// Abort resets the stream. Bytes that the other end has not read yet precede the error.
func (s *stream) Abort() error { return s.shut(syscall.ECONNRESET) }

func (s *stream) shut(end error) error {
	s.out.update(func() {
		if s.out.writeClosed {
			return
		}
		s.out.writeClosed = true
		if end != io.EOF {
			s.out.end = end
		}
		s.out.finish(end)
	})
	s.in.update(func() { s.in.readClosed, s.in.deaf, s.in.buf = true, true, nil })
	return nil
}

// broken says whether the other end has reset the stream.
func (s *stream) broken() bool {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	return s.in.end == syscall.ECONNRESET
}

func (s *stream) SetReadDeadline(t time.Time) error {
	s.in.update(func() { s.in.readBy = t })
	s.in.wakeAt(t)
	return nil
}

func (s *stream) SetWriteDeadline(t time.Time) error {
	s.out.update(func() { s.out.writeBy = t })
	s.out.wakeAt(t)
	return nil
}

func (h *half) wakeAt(t time.Time) {
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), func() { h.update(func() {}) })
	}
}

func (s *stream) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

func (s *stream) LocalAddr() net.Addr  { return streamAddr{} }
func (s *stream) RemoteAddr() net.Addr { return streamAddr{} }

type streamAddr struct{}

func (streamAddr) Network() string { return "stream" }
func (streamAddr) String() string  { return "stream" }
