package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// DefaultDialTimeout is how long an origin may take to answer.
const DefaultDialTimeout = 10 * time.Second

// ErrStopped is why sessions end that an Engine aborts, and why it takes no new ones.
var ErrStopped = errors.New("proxy: sluice stops")

// Engine carries sessions: it is the Handler that inbounds give their clients to.
// Set its fields before the first session. The zero value of each but Router is useful.
type Engine struct {
	Router      Router
	Relay       relay.Relay
	DialTimeout time.Duration // how long a dial may take; 0: DefaultDialTimeout
	Log         *slog.Logger  // nil: silent

	mu       sync.Mutex
	sessions map[*session]struct{}
	stopped  bool
}

// session is one stream from its request to its record.
type session struct {
	engine   *Engine
	flow     Flow
	pending  Pending
	outbound string
	start    time.Time
	stats    relay.Stats

	// guarded by Engine.mu
	cancel context.CancelCauseFunc // while it dials
	pair   *relay.Pair             // while it relays
}

// HandleStream routes f, dials, answers p with the outcome, and relays. It returns when the dial
// failed or the relay has begun.
func (e *Engine) HandleStream(ctx context.Context, f Flow, p Pending) {
	s := &session{engine: e, flow: f, pending: p, start: time.Now()}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := e.begin(s, cancel); err != nil {
		p.Reject(err)
		s.failed(err)
		return
	}
	name, dialer := e.Router.Route(f)
	s.outbound = name
	origin, err := s.dial(ctx, dialer)
	if err != nil {
		p.Reject(err)
		s.failed(err)
		return
	}
	client, head, err := p.Accept()
	if err != nil {
		relay.Abort(origin)
		s.failed(err)
		return
	}
	s.join(client, head, origin)
}

// dial opens the way to the origin. It is given up when the client resets its conn: nobody waits
// for the answer any more. A client that has only ended its own bytes does wait.
func (s *session) dial(ctx context.Context, d Dialer) (net.Conn, error) {
	timeout := s.engine.DialTimeout
	if timeout == 0 {
		timeout = DefaultDialTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, context.DeadlineExceeded)
	defer cancel()
	if w, ok := s.pending.(Watched); ok {
		var stop context.CancelFunc
		ctx, stop = relay.ResetContext(ctx, w.Conn())
		defer stop()
	}
	origin, err := d.DialStream(ctx, s.flow.Dst)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		err = &canceledError{cause: context.Cause(ctx)}
	}
	return origin, err
}

// canceledError says why a dial was given up. It is a cancellation, whatever its cause.
type canceledError struct{ cause error }

func (e *canceledError) Error() string        { return "proxy: dial given up: " + e.cause.Error() }
func (e *canceledError) Is(target error) bool { return target == context.Canceled }

// begin enters s among the sessions.
func (e *Engine) begin(s *session, cancel context.CancelCauseFunc) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped {
		return ErrStopped
	}
	if e.sessions == nil {
		e.sessions = make(map[*session]struct{})
	}
	e.sessions[s] = struct{}{}
	s.cancel = cancel
	return nil
}

// join relays. The lock is held while the pair starts, so that Abort sees either the dial or the pair.
func (s *session) join(client net.Conn, head []byte, origin net.Conn) {
	e := s.engine
	e.mu.Lock()
	s.cancel = nil
	s.pair = e.Relay.Start(relay.WithHead(client, head), origin, &s.stats, s.relayed)
	if e.stopped {
		s.pair.Abort(ErrStopped)
	}
	e.mu.Unlock()
}

// Abort ends all sessions, refuses new ones from now on, and returns how many it ended.
// It does not wait: Inbound.Serve returns when the last session is done.
func (e *Engine) Abort() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stopped = true
	for s := range e.sessions {
		if s.pair != nil {
			s.pair.Abort(ErrStopped)
		} else if s.cancel != nil {
			s.cancel(ErrStopped)
		}
	}
	return len(e.sessions)
}

// Sessions returns how many sessions there are.
func (e *Engine) Sessions() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.sessions)
}

func (s *session) end() {
	s.engine.mu.Lock()
	delete(s.engine.sessions, s)
	s.engine.mu.Unlock()
	s.pending.Done()
}

// failed records a session that did not come to relaying.
func (s *session) failed(err error) {
	if log, level, ok := s.logger(ReasonOf(err)); ok {
		log.LogAttrs(context.Background(), level, "session failed", append(s.attrs(ReasonOf(err)), slog.Any("err", err))...)
	}
	s.end()
}

// relayed records a session that was relayed.
func (s *session) relayed(res relay.Result) {
	err := res.Err()
	reason := ReasonOf(err)
	if log, level, ok := s.logger(reason); ok {
		attrs := append(s.attrs(reason),
			slog.Int64("up", res.AToB.Bytes), slog.Int64("down", res.BToA.Bytes),
			slog.String("first", sideName(res.First)),
		)
		if err != nil {
			attrs = append(attrs, slog.Any("err", err))
		}
		log.LogAttrs(context.Background(), level, "session", attrs...)
	}
	s.end()
}

// sideName names a relay's side by its part in a session.
func sideName(s relay.Side) string {
	switch s {
	case relay.A:
		return "client"
	case relay.B:
		return "origin"
	}
	return "none"
}

func (s *session) logger(r Reason) (log *slog.Logger, level slog.Level, ok bool) {
	log = s.engine.Log
	switch r {
	case Done, Canceled, Idle, HalfOpen, Reset:
		level = slog.LevelInfo
	default:
		level = slog.LevelWarn
	}
	return log, level, log != nil && log.Enabled(context.Background(), level)
}

func (s *session) attrs(r Reason) []slog.Attr {
	attrs := make([]slog.Attr, 0, 12)
	attrs = append(attrs, slog.String("inbound", s.flow.Inbound))
	if s.flow.Client.IsValid() {
		attrs = append(attrs, slog.Any("client", s.flow.Client))
	}
	if s.flow.User != "" {
		attrs = append(attrs, slog.String("user", s.flow.User))
	}
	return append(attrs,
		slog.String("dst", s.flow.Dst.String()),
		slog.String("via", s.outbound),
		slog.String("reason", r.String()),
		slog.Duration("took", time.Since(s.start).Round(time.Microsecond)),
	)
}
