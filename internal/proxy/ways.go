package proxy

import (
	"context"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// A Denier is a Dialer that reaches nothing: it is where rules send what must not get out.
type Denier interface {
	Dialer
	// Denied returns why dst cannot be reached.
	Denied(dst Addr) error
}

// ways is the origins' end of a session of datagrams whose router has rules: each datagram goes the way that they choose for its
// place. The conn that it embeds is that of the first.
type ways struct {
	relay.PacketConn
	session *session
	router  Router
	flow    Flow
	ctx     context.Context
	cancel  context.CancelFunc

	// Of Way alone.
	known  map[relay.Endpoint]way // by place
	opened map[string]way         // by name; or that could not be opened
}

type way struct {
	conn relay.PacketConn // nil: the first
	err  error            // holds until then
	then time.Time
}

// holds says whether w is still to be gone by.
func (w way) holds() bool { return w.err == nil || time.Now().Before(w.then) }

const (
	placesKnown = 256             // that are kept of one session
	wayRetry    = 5 * time.Second // how long a way that could not be opened is not tried again
)

var (
	_ relay.Switch      = (*ways)(nil)
	_ relay.BatchReader = (*ways)(nil)
	_ relay.BatchWriter = (*ways)(nil)
	_ relay.Dropper     = (*ways)(nil)
)

// byRules returns c, which was opened for f, or c with the rules in front, where there are any.
func (s *session) byRules(ctx context.Context, c relay.PacketConn, f Flow) relay.PacketConn {
	router := s.watch.engine.Router
	if _, fixed := router.(Static); fixed {
		return c
	}
	ctx, cancel := context.WithCancel(ctx)
	return &ways{
		PacketConn: c, session: s, router: router, flow: f, ctx: ctx, cancel: cancel,
		known: map[relay.Endpoint]way{f.Dst.Endpoint(): {}}, opened: make(map[string]way),
	}
}

// Way implements relay.Switch. It opens a way that is new; others of the session's datagrams wait meanwhile.
func (w *ways) Way(e relay.Endpoint) (relay.PacketConn, error) {
	if k, ok := w.known[e]; ok && k.holds() {
		return k.conn, k.err
	}
	if len(w.known) >= placesKnown {
		clear(w.known)
	}
	k := w.choose(e)
	w.known[e] = k
	return k.conn, k.err
}

func (w *ways) choose(e relay.Endpoint) way {
	f := w.flow
	f.Dst = UDP(e.Host(), e.Port)
	name, dialer := w.router.Route(f)
	if name == w.session.outbound {
		return way{}
	}
	if d, ok := dialer.(Denier); ok {
		return way{err: d.Denied(f.Dst), then: time.Now().Add(wayRetry)}
	}
	k, ok := w.opened[name]
	if !ok || !k.holds() {
		k.conn, k.err = w.session.dialPackets(w.ctx, dialer, f.Dst)
		k.then = time.Now().Add(wayRetry)
		w.opened[name] = k
	}
	return k
}

// Close closes the first way, and has none opened any more.
func (w *ways) Close() error {
	w.cancel()
	return w.PacketConn.Close()
}

// WritePackets implements relay.BatchWriter.
func (w *ways) WritePackets(ps []relay.Packet) (n int, err error) {
	if b, ok := w.PacketConn.(relay.BatchWriter); ok {
		return b.WritePackets(ps)
	}
	for n < len(ps) && err == nil {
		if err = w.WritePacket(&ps[n]); err == nil {
			n++
		}
	}
	return n, err
}

// ReadMore implements relay.BatchReader.
func (w *ways) ReadMore(ps []relay.Packet) int {
	if r, ok := w.PacketConn.(relay.BatchReader); ok {
		return r.ReadMore(ps)
	}
	return 0
}

// Dropped implements relay.Dropper.
func (w *ways) Dropped() int64 {
	if d, ok := w.PacketConn.(relay.Dropper); ok {
		return d.Dropped()
	}
	return 0
}
