package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
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

	begun sync.Once
	epoch time.Time // when the first session began

	mu       sync.Mutex
	sessions roll
	contexts map[context.Context]*watch
	stopped  bool

	records   []record // to be logged
	lost      int      // how many were not kept since the last was logged
	recording bool     // writeRecords runs
}

// session is one client's stream, or its datagrams, from the request to the record. There is one for each that is idle, too: it is kept small.
type session struct {
	watch    *watch
	inbound  string
	client   netip.AddrPort
	user     string
	host     string // of the destination
	port     uint16
	network  network
	outbound string
	start    time.Duration // after the engine's epoch
	stats    relay.Stats
	done     func() // ends it for the inbound

	// guarded by Engine.mu
	cancel     func(cause error)  // while it dials
	pair       *relay.Pair        // while it relays
	packets    *relay.PacketStats // while it relays datagrams
	prev, next *session           // in the roll; both nil when it is not there
}

// attempt is a session whose client waits for its answer.
type attempt struct {
	*session
	pending Pending
}

// network is an Addr's, in a byte.
type network uint8

var networks = [...]string{"", "tcp", "udp", "unix"}

func (s *session) setDst(a Addr) {
	s.host, s.port, s.network = a.Host, a.Port, network(max(0, slices.Index(networks[:], a.Network)))
}

func (s *session) dst() Addr { return Addr{Network: networks[s.network], Host: s.host, Port: s.port} }

// watch aborts the sessions of one context when that is cancelled. Most sessions of an inbound share one.
type watch struct {
	engine   *Engine
	ctx      context.Context
	sessions int
	stop     func() bool
}

// roll is a list of sessions.
type roll struct {
	first *session
	n     int
}

func (r *roll) enter(s *session) {
	s.next, s.prev = r.first, s // the first has itself before it
	if r.first != nil {
		r.first.prev = s
	}
	r.first = s
	r.n++
}

// leave takes s out and says whether it was in.
func (r *roll) leave(s *session) bool {
	if s.prev == nil {
		return false
	}
	if r.first == s {
		if r.first = s.next; s.next != nil {
			s.next.prev = s.next
		}
	} else if s.prev.next = s.next; s.next != nil {
		s.next.prev = s.prev
	}
	s.prev, s.next = nil, nil
	r.n--
	return true
}

var _ NowHandler = (*Engine)(nil)

// HandleStream routes f, dials, answers p with the outcome, and relays. It returns when the dial
// failed or the relay has begun, or, with a [Starter], when the dial has begun.
func (e *Engine) HandleStream(ctx context.Context, f Flow, p Pending) {
	name, dialer := e.Router.Route(f)
	a := &attempt{e.newSession(f, name, p.Done), p}
	if err := e.begin(ctx, a.session); err != nil {
		a.dialed(nil, err)
		return
	}
	defer e.forgetPanicked(a.session)
	expectant, expects := p.(Expectant)
	if !expects && a.startDial(dialer) {
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a.cancelBy(cancel)
	if expects {
		a.dialed(a.await(ctx, dialer, expectant))
		return
	}
	a.dialed(a.dial(ctx, dialer))
}

// HandleStreamNow implements NowHandler: it takes what a [Starter] dials without a goroutine.
func (e *Engine) HandleStreamNow(ctx context.Context, f Flow, p Pending) bool {
	name, dialer, ok := e.routeNow(f)
	if !ok {
		return false
	}
	if _, ok := dialer.(Starter); !ok {
		return false
	}
	a := &attempt{e.newSession(f, name, p.Done), p}
	defer e.forgetPanicked(a.session)
	if err := e.begin(ctx, a.session); err != nil {
		a.dialed(nil, err)
		return true
	}
	if a.startDial(dialer) {
		return true
	}
	e.remove(a.session)
	return false
}

func (e *Engine) newSession(f Flow, outbound string, done func()) *session {
	s := &session{inbound: f.Inbound, client: f.Client, user: f.User, outbound: outbound, start: e.clock(), done: done}
	s.setDst(f.Dst)
	return s
}

// clock returns the time since the engine's epoch.
func (e *Engine) clock() time.Duration {
	e.begun.Do(func() { e.epoch = time.Now() })
	return time.Since(e.epoch)
}

func (e *Engine) routeNow(f Flow) (name string, d Dialer, ok bool) {
	if r, ok := e.Router.(NowRouter); ok {
		return r.RouteNow(f)
	}
	name, d = e.Router.Route(f)
	return name, d, true
}

// forgetPanicked is deferred: an inbound outlives a panic and ends the client, and the session is over with it.
func (e *Engine) forgetPanicked(s *session) {
	if v := recover(); v != nil {
		e.remove(s)
		panic(v)
	}
}

// dialed answers the client with the dial's outcome and begins to relay.
func (a *attempt) dialed(origin net.Conn, err error) {
	if err != nil {
		a.pending.Reject(err)
		a.failed(err)
		return
	}
	client, head, err := a.pending.Accept()
	if err != nil {
		relay.Abort(origin)
		a.failed(err)
		return
	}
	if r, ok := a.pending.(Releaser); ok {
		a.done = r.Release()
	}
	a.join(client, head, origin)
}

// startDial dials without a goroutine where that can be done.
func (a *attempt) startDial(d Dialer) bool {
	starter, ok := d.(Starter)
	if !ok {
		return false
	}
	w, ok := a.pending.(Watched)
	if !ok {
		return false
	}
	cancel, handled := starter.StartDial(w.Conn(), a.dst(), a.watch.engine.dialTimeout(), a.dialed)
	if handled {
		a.cancelBy(cancel)
	}
	return handled
}

// cancelBy says how the dial is cancelled. The dial may be over by now.
func (s *session) cancelBy(cancel func(error)) {
	e := s.watch.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if s.pair == nil {
		s.cancel = cancel
	}
	if e.stopped {
		cancel(ErrStopped)
	} else if cause := s.cause(); cause != nil {
		cancel(cause)
	}
}

// cause returns why the session's context was cancelled, nil if it was not.
func (s *session) cause() error { return context.Cause(s.watch.ctx) }

func (e *Engine) dialTimeout() time.Duration {
	if e.DialTimeout == 0 {
		return DefaultDialTimeout
	}
	return e.DialTimeout
}

// dial opens the way to the origin. It is given up when the client resets its conn: nobody waits
// for the answer any more. A client that has only ended its own bytes does wait.
func (a *attempt) dial(ctx context.Context, d Dialer) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, a.watch.engine.dialTimeout(), context.DeadlineExceeded)
	defer cancel()
	if w, ok := a.pending.(Watched); ok {
		var stop context.CancelFunc
		ctx, stop = relay.ResetContext(ctx, w.Conn())
		defer stop()
	}
	origin, err := d.DialStream(ctx, a.dst())
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		err = &canceledError{cause: context.Cause(ctx)}
	}
	return origin, err
}

// DefaultBindTimeout is how long a stream that a client waits for may take to come.
const DefaultBindTimeout = 2 * time.Minute

// await is dial for a stream that comes from the destination.
func (a *attempt) await(ctx context.Context, d Dialer, p Expectant) (net.Conn, error) {
	binder, ok := d.(Binder)
	if !ok {
		return nil, fmt.Errorf("proxy: %s cannot wait for streams: %w", a.outbound, errors.ErrUnsupported)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, DefaultBindTimeout, context.DeadlineExceeded)
	defer cancel()
	if w, ok := p.(Watched); ok {
		var stop context.CancelFunc
		ctx, stop = relay.ResetContext(ctx, w.Conn())
		defer stop()
	}
	ln, err := binder.Bind(ctx, a.dst())
	if err == nil {
		defer ln.Close()
		err = p.Bound(ln.Addr())
	}
	var origin net.Conn
	if err == nil {
		if origin, err = ln.Accept(); err == nil {
			p.Came(peerOf(ln, origin))
		}
	}
	switch cause := ctx.Err(); {
	case err == nil || cause == nil:
	case errors.Is(cause, context.Canceled):
		err = &canceledError{cause: context.Cause(ctx)}
	default:
		err = fmt.Errorf("proxy: no stream came: %w", cause)
	}
	return origin, err
}

// peerOf returns the address that c came from, which ln has accepted.
func peerOf(ln net.Listener, c net.Conn) net.Addr {
	if p, ok := ln.(interface{ Peer() net.Addr }); ok {
		return p.Peer()
	}
	return c.RemoteAddr()
}

// canceledError says why a dial was given up. It is a cancellation, whatever its cause.
type canceledError struct{ cause error }

func (e *canceledError) Error() string        { return "proxy: dial given up: " + e.cause.Error() }
func (e *canceledError) Is(target error) bool { return target == context.Canceled }

// begin enters s among the sessions.
func (e *Engine) begin(ctx context.Context, s *session) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	w := e.contexts[ctx]
	if w == nil {
		w = &watch{engine: e, ctx: ctx}
	}
	s.watch = w
	if e.stopped {
		return ErrStopped
	}
	if w.sessions == 0 {
		w.stop = context.AfterFunc(ctx, func() { e.abortOf(w) })
		if e.contexts == nil {
			e.contexts = make(map[context.Context]*watch)
		}
		e.contexts[ctx] = w
	}
	w.sessions++
	e.sessions.enter(s)
	return nil
}

// end takes s out and is done.
func (s *session) end() {
	s.watch.engine.remove(s)
	s.done()
}

// remove takes s out of the sessions.
func (e *Engine) remove(s *session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.sessions.leave(s) {
		return
	}
	w := s.watch
	if w.sessions--; w.sessions == 0 {
		w.stop()
		delete(e.contexts, w.ctx)
	}
}

// join relays. The lock is held while the pair starts, so that an abort finds either the dial or the pair.
func (s *session) join(client net.Conn, head []byte, origin net.Conn) {
	e := s.watch.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	s.cancel = nil
	s.pair = e.Relay.Start(relay.WithHead(client, head), origin, &s.stats, s.relayed)
	if e.stopped {
		s.pair.Abort(ErrStopped)
	} else if cause := s.cause(); cause != nil {
		s.pair.Abort(cause)
	}
}

// abort ends the session. The engine's lock is held.
func (s *session) abort(cause error) {
	if s.pair != nil {
		s.pair.Abort(cause)
	} else if s.cancel != nil {
		s.cancel(cause)
	}
}

// abortOf ends the sessions of a context.
func (e *Engine) abortOf(w *watch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := e.sessions.first; s != nil; s = s.next {
		if s.watch == w {
			s.abort(context.Cause(w.ctx))
		}
	}
}

// Abort ends all sessions, refuses new ones from now on, and returns how many it ended.
// It does not wait: Inbound.Serve returns when the last session is done.
func (e *Engine) Abort() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stopped = true
	for s := e.sessions.first; s != nil; s = s.next {
		s.abort(ErrStopped)
	}
	return e.sessions.n
}

// Sessions returns how many sessions there are.
func (e *Engine) Sessions() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sessions.n
}

// failed ends a session that did not come to relaying.
func (s *session) failed(err error) { s.conclude(record{session: s, err: err}) }

// relayed ends a session that was relayed. It runs on a goroutine that serves many, and does not block.
func (s *session) relayed(res relay.Result) {
	s.conclude(record{session: s, err: res.Err(), result: &res})
}

// record is what is logged of a session.
type record struct {
	session *session
	err     error
	result  *relay.Result      // nil if it did not come to relaying
	packets *relay.PacketStats // nil but for datagrams that were relayed
	took    time.Duration
}

// recordsMax bounds the records that wait for a log that does not take them; more are counted, not kept.
const recordsMax = 10000

// conclude has the session logged, where that is wanted, and ended. A log may block, and the caller must not: records
// are written by a goroutine of their own, which is there while there are any.
func (s *session) conclude(r record) {
	e := s.watch.engine
	if e.Log == nil || !e.Log.Enabled(context.Background(), r.level()) {
		s.end()
		return
	}
	r.took = e.clock() - s.start
	e.mu.Lock()
	lost := len(e.records) >= recordsMax
	if lost {
		e.lost++
	} else {
		e.records = append(e.records, r)
	}
	if !e.recording {
		e.recording = true
		go e.writeRecords()
	}
	e.mu.Unlock()
	if lost {
		s.end()
	}
}

// writeRecords logs and ends the sessions that were concluded, until there are none.
func (e *Engine) writeRecords() {
	for {
		e.mu.Lock()
		records, lost := e.records, e.lost
		e.records, e.lost = nil, 0
		e.recording = len(records) > 0 || lost > 0
		e.mu.Unlock()
		if len(records) == 0 && lost == 0 {
			return
		}
		if lost > 0 {
			e.Log.Warn("sessions were not logged: the log did not keep up", "sessions", lost)
		}
		for _, r := range records {
			r.log(e.Log)
			r.session.end()
		}
	}
}

func (r *record) level() slog.Level {
	switch ReasonOf(r.err) {
	case Done, Canceled, Idle, HalfOpen, Reset:
		return slog.LevelInfo
	}
	return slog.LevelWarn
}

func (r *record) log(log *slog.Logger) {
	s := r.session
	attrs := make([]slog.Attr, 0, 12)
	attrs = append(attrs, slog.String("inbound", s.inbound))
	if s.client.IsValid() {
		attrs = append(attrs, slog.String("client", s.client.String()))
	}
	if s.user != "" {
		attrs = append(attrs, slog.String("user", s.user))
	}
	attrs = append(attrs,
		slog.String("dst", s.dst().String()),
		slog.String("via", s.outbound),
		slog.String("reason", ReasonOf(r.err).String()),
		slog.Duration("took", r.took.Round(time.Microsecond)),
	)
	message := "session failed"
	if res := r.result; res != nil {
		message = "session"
		attrs = append(attrs, slog.Int64("up", res.AToB.Bytes), slog.Int64("down", res.BToA.Bytes),
			slog.String("first", sideName(res.First)))
	}
	if st := r.packets; st != nil {
		message = "datagrams"
		up, down := st.Bytes()
		lostUp, lostDown := st.Dropped()
		attrs = append(attrs, slog.Int64("up", up), slog.Int64("down", down))
		if lost := lostUp + lostDown; lost > 0 {
			attrs = append(attrs, slog.Int64("dropped", lost))
		}
	}
	if r.err != nil {
		attrs = append(attrs, slog.Any("err", r.err))
	}
	log.LogAttrs(context.Background(), r.level(), message, attrs...)
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
