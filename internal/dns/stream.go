package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

const (
	streamIdle = 30 * time.Second // without a question or an answer
	streamMax  = 32               // questions of a stream at a time; the next is not read before
)

// stream is a client's DNS over TCP (RFC 7766): any number of questions, whose answers go out as they come.
type stream struct {
	h       *Handler
	flow    proxy.Flow
	conn    net.Conn
	idle    *time.Timer   // closes the conn, which may have no deadlines
	slots   chan struct{} // one taken for each question until its answer is written
	answers chan []byte   // never full; nil where there is none
	asking  sync.WaitGroup
}

var errNoQuestion = errors.New("dns: the client does not ask")

// serveStream is the origin of a stream to port 53.
func (h *Handler) serveStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	defer p.Done()
	if h.ctx.Err() != nil {
		p.Reject(proxy.ErrStopped)
		return
	}
	c, head, err := p.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(h.ctx, cancel)()
	defer context.AfterFunc(ctx, func() { relay.Abort(c) })()
	s := &stream{h: h, flow: f, conn: c, slots: make(chan struct{}, streamMax), answers: make(chan []byte, streamMax)}
	s.idle = time.AfterFunc(streamIdle, func() { c.Close() })
	defer s.idle.Stop()
	h.up.acquire()
	defer h.up.release()
	var writing sync.WaitGroup
	writing.Go(s.write)
	if !errors.Is(s.read(ctx, bufio.NewReader(relay.WithHead(c, head))), io.EOF) {
		cancel() // nobody waits for the answers any more
	}
	s.asking.Wait()
	close(s.answers)
	writing.Wait()
}

// read takes questions until the client's end, which is io.EOF if it is clean.
func (s *stream) read(ctx context.Context, r *bufio.Reader) error {
	for {
		raw, err := readMessage(r)
		if err != nil {
			return err
		}
		s.idle.Reset(streamIdle)
		q, m := parse(raw)
		if m == nil && q == nil {
			return errNoQuestion
		}
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		if m != nil {
			s.answers <- pack(m)
		} else if b := s.h.now(q, s.flow.Client); b != nil {
			s.answers <- b
		} else {
			s.asking.Go(func() { s.resolve(ctx, q) })
		}
	}
}

// resolve has the resolver answer q, when it is q's turn.
func (s *stream) resolve(ctx context.Context, q *question) {
	var answer []byte
	defer s.h.recovered()
	defer func() { s.answers <- answer }()
	if s.h.enter(ctx, true) {
		defer s.h.leave()
		answer = s.h.resolve(ctx, s.flow, q, "tcp")
	}
}

// write sends the answers. Where that fails the client is gone, as read will find.
func (s *stream) write() {
	for b := range s.answers {
		if b != nil {
			if _, err := s.conn.Write(frame(b)); err != nil {
				s.conn.Close()
			}
			s.idle.Reset(streamIdle)
		}
		<-s.slots
	}
}

// frame returns a message as it stands in a stream: its length comes first.
func frame(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
}

// readMessage reads a message of a stream.
func readMessage(r *bufio.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}
