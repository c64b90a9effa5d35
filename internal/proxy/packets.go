package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// HandlePackets implements Handler: it routes f, opens the way out, and relays. Later datagrams for other places are routed, too, and may open
// other ways. Where a way out carries no datagrams, or cannot be opened, the client is told, if it can be.
func (e *Engine) HandlePackets(ctx context.Context, f Flow, c relay.PacketConn) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	name, dialer := e.Router.Route(f)
	over := make(chan struct{})
	s := e.newSession(f, name, func() { close(over) })
	s.cancel = cancel
	err := e.begin(ctx, s)
	defer e.forgetPanicked(s)
	var origin relay.PacketConn
	if err == nil {
		origin, err = s.dialPackets(ctx, dialer, s.dst())
	}
	if err != nil {
		if r, ok := c.(relay.Refuser); ok {
			r.Refuse(f.Dst.Endpoint(), err)
		}
		c.Close()
		s.failed(err)
		<-over
		return
	}
	st := new(relay.PacketStats)
	s.setPackets(st)
	res := e.Relay.JoinPackets(ctx, c, s.byRules(ctx, origin, f), st)
	err = res.Err
	if res.End == relay.Idle || res.First == relay.A && errors.Is(err, net.ErrClosed) {
		err = nil // this is how datagrams end
	}
	s.conclude(record{session: s, err: err, packets: st})
	<-over // until it is in the log: whoever called may be the last to wait for that
}

func (s *session) dialPackets(ctx context.Context, d Dialer, dst Addr) (relay.PacketConn, error) {
	p, ok := d.(PacketDialer)
	if !ok {
		return nil, fmt.Errorf("proxy: %s carries no datagrams: %w", s.outbound, errors.ErrUnsupported)
	}
	dialing, cancel := context.WithTimeoutCause(ctx, s.watch.engine.dialTimeout(), context.DeadlineExceeded)
	defer cancel()
	c, err := p.DialPackets(dialing, dst)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		err = &canceledError{cause: context.Cause(ctx)}
	}
	return c, err
}

func (s *session) setPackets(st *relay.PacketStats) {
	e := s.watch.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	s.packets = st
}

// EndSilent ends the sessions of datagrams that have been silent for so long. Datagrams have no end that could be waited for.
func (e *Engine) EndSilent(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := e.sessions.first; s != nil; s = s.next {
		if s.packets != nil && s.packets.Silence() >= d {
			s.abort(ErrStopped)
		}
	}
}
