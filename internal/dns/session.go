package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

const (
	questionIdle = 5 * time.Second // how long a session that only asked is kept for more
	lanesMax     = 256             // of a session
	lanesAll     = 4096            // of all sessions of a Handler, but for the first of each
	portsMax     = 1024            // of a name that are kept; then those before are forgotten
)

// session is the datagrams of one client. They go to where they are for: questions are answered here, those to one
// fake address are a lane, and the rest is another lane. Each lane is a session of Next's, with its own destination.
//
// As long as there is but one lane it reads the client's conn itself. Once a datagram comes that is not for it, there
// is a goroutine that reads and hands out.
type session struct {
	h    *Handler
	ctx  context.Context
	flow proxy.Flow
	conn relay.PacketConn
	all  sync.WaitGroup // lanes, questions, and pump

	asks       context.Context // of the questions; ends with the client's conn
	cancelAsks context.CancelFunc

	memory memory     // of what the lanes' queues hold
	out    sync.Mutex // one datagram is written at a time

	mu      sync.Mutex
	lanes   map[netip.Addr]*lane // by fake address; the rest at the zero Addr
	taken   int                  // lanes that have not left
	pumping bool
	asked   time.Time   // when there was last a question
	asking  int         // questions that are not answered
	idle    *time.Timer // nil before the first question
	over    bool
}

// HandlePackets implements [proxy.Handler]. Each fake address that the client sends to is a session of its own for
// Next.
func (h *Handler) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	if h.Mode == Off {
		h.Next.HandlePackets(ctx, f, c)
		return
	}
	h.begin()
	s := &session{h: h, ctx: ctx, flow: f, conn: c, lanes: make(map[netip.Addr]*lane)}
	s.memory.all = &h.queued
	s.asks, s.cancelAsks = context.WithCancel(ctx)
	defer s.end()
	defer context.AfterFunc(ctx, s.close)()
	first := f.Dst.Endpoint()
	run := s.pump
	if isQuestion(first) {
		s.pumping = true
		s.keep()
	} else {
		l, err := s.lane(first)
		if err != nil {
			s.refuse(first, err)
			return
		}
		run = l.run
	}
	defer context.AfterFunc(h.ctx, s.closeIfDone)()
	run()
}

// end waits for all of the session. Its client's conn is closed.
func (s *session) end() {
	s.all.Wait()
	s.close()
	if s.idle != nil {
		s.idle.Stop()
		s.h.up.release()
	}
}

// close ends the client's conn, and with it the session.
func (s *session) close() {
	s.mu.Lock()
	s.over = true
	lanes := s.lanes
	s.lanes = nil
	s.mu.Unlock()
	for _, l := range lanes {
		l.stop()
	}
	s.cancelAsks()
	s.conn.Close()
}

// closeIfDone closes a session that has no lane and no question. The timer of the last question calls it, and the
// Handler's end.
func (s *session) closeIfDone() {
	s.mu.Lock()
	done := len(s.lanes) == 0 && s.asking == 0 && (time.Since(s.asked) >= questionIdle || s.h.ctx.Err() != nil)
	s.mu.Unlock()
	if done {
		s.close()
	}
}

// keep keeps the session for a while, since there was a question.
func (s *session) keep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = time.Now()
	if s.idle == nil {
		s.h.up.acquire()
		s.idle = time.AfterFunc(questionIdle, s.closeIfDone)
		return
	}
	s.idle.Reset(questionIdle)
}

// isQuestion says whether datagrams to e are DNS.
func isQuestion(e relay.Endpoint) bool { return e.Port == Port }

// startPump starts pump, for a session whose first lane is not alone any more.
func (s *session) startPump() {
	s.all.Go(func() { defer s.h.recovered(); s.pump() })
}

// pump hands out what the client sends.
func (s *session) pump() {
	defer s.close()
	var p relay.Packet
	defer p.Free()
	for {
		if err := s.conn.ReadPacket(&p); err == nil {
			s.dispatch(&p)
		} else if _, ok := errors.AsType[*relay.UnreachableError](err); !ok {
			return
		}
	}
}

// dispatch hands out p, whose memory may be gone then.
func (s *session) dispatch(p *relay.Packet) {
	if isQuestion(p.Endpoint) {
		s.question(p)
		return
	}
	if l, err := s.lane(p.Endpoint); err == nil {
		l.put(p)
	} else {
		s.refuse(p.Endpoint, err)
	}
}

// refuse tells the client that there is no lane to e.
func (s *session) refuse(e relay.Endpoint, err error) {
	switch {
	case errors.Is(err, net.ErrClosed):
		return
	case errors.Is(err, errUnknown):
		s.h.unknownAddress(e.IP)
	case s.h.scattered.begins():
		s.h.log.Warn("refused datagrams", "err", err, "client", s.flow.Client, "addr", e)
	}
	refuse(s.conn, e, err)
}

// question answers p.
func (s *session) question(p *relay.Packet) {
	s.keep()
	q, m := parse(p.Data)
	switch {
	case m != nil:
		s.reply(p.Endpoint, pack(m))
		return
	case q == nil || s.h.ctx.Err() != nil:
		return
	}
	if b := s.h.now(q, s.flow.Client); b != nil {
		s.reply(p.Endpoint, b)
		return
	}
	if !s.h.enter(s.asks, false) {
		return
	}
	q.raw = append([]byte(nil), q.raw...) // outlives the packet
	from := p.Endpoint
	s.mu.Lock()
	s.asking++
	s.mu.Unlock()
	s.all.Go(func() { s.resolve(from, q) })
}

// resolve has the resolver answer q, which has taken a slot.
func (s *session) resolve(from relay.Endpoint, q *question) {
	defer s.h.recovered()
	defer s.answered()
	defer s.h.leave()
	s.reply(from, s.h.resolve(s.asks, s.flow, q, "udp"))
}

// answered ends a question that took time.
func (s *session) answered() {
	s.mu.Lock()
	s.asking--
	s.mu.Unlock()
	s.keep()
	if s.h.ctx.Err() != nil {
		s.closeIfDone()
	}
}

// reply sends an answer to the client, as from where it has asked.
func (s *session) reply(from relay.Endpoint, answer []byte) {
	if answer != nil {
		s.write(&relay.Packet{Endpoint: from, Data: answer})
	}
}

// write sends p to the client.
func (s *session) write(p *relay.Packet) error {
	s.out.Lock()
	defer s.out.Unlock()
	return s.conn.WritePacket(p)
}

// refuse tells a client that datagrams to e do not arrive, where it can be told.
func refuse(c relay.PacketConn, e relay.Endpoint, err error) {
	if r, ok := c.(relay.Refuser); ok {
		r.Refuse(e, err)
	}
}
