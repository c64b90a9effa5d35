package dns

import (
	"bufio"
	"context"
	"encoding/binary"
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
	h     *Handler
	flow  proxy.Flow
	conn  net.Conn
	slots chan struct{}
	idle  *time.Timer // closes the conn, which may have no deadlines
	all   sync.WaitGroup

	out sync.Mutex // one answer is written at a time
}

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
	s := &stream{h: h, flow: f, conn: c, slots: make(chan struct{}, streamMax)}
	s.idle = time.AfterFunc(streamIdle, func() { c.Close() })
	defer s.idle.Stop()
	h.up.acquire()
	defer h.up.release()
	s.read(ctx, bufio.NewReader(relay.WithHead(c, head)))
	s.all.Wait()
}

// read takes questions until the client's end.
func (s *stream) read(ctx context.Context, r *bufio.Reader) {
	for {
		raw, err := readMessage(r)
		if err != nil {
			return
		}
		s.idle.Reset(streamIdle)
		q, m := parse(raw)
		if m == nil && q == nil {
			return // it does not speak DNS
		}
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		s.all.Go(func() {
			defer func() { <-s.slots }()
			if m != nil {
				s.write(pack(m))
			} else {
				s.write(s.h.answer(ctx, s.flow, q, "tcp", true))
			}
		})
	}
}

// write sends an answer. Where that fails the client is gone, as read will find.
func (s *stream) write(answer []byte) {
	if answer == nil {
		return
	}
	s.out.Lock()
	defer s.out.Unlock()
	if _, err := s.conn.Write(frame(answer)); err != nil {
		s.conn.Close()
		return
	}
	s.idle.Reset(streamIdle)
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
