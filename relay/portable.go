package relay

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// The portable engine: for each direction a goroutine, the pump, that reads and writes; and the
// caller's own, which drives the machine: it alone decides, closes and keeps the time. A pump
// reports and obeys. A pump that waits in a conn that has no deadlines is freed by closing the conn.

// pair is a joined pair under the portable engine.
type pair struct {
	relay  *Relay
	stats  *Stats
	sides  [2]*conn
	heads  [2][]byte
	m      machine
	gov    *governor // nil: no limits on its bytes
	start  time.Time
	events chan event // holds all that can be reported, so that no report blocks
	pumps  sync.WaitGroup

	moved   [2]atomic.Int64 // when the direction last moved a byte, since start
	waiting [2]atomic.Bool  // the direction holds bytes that its destination has not taken
	stopped [2]atomic.Bool  // the direction must pass on nothing more
}

// event is what a pump or a watch reports.
type event struct {
	kind eventKind
	side Side // the source of the pump, or the conn that failed
	err  error
}

type eventKind uint8

const (
	evEOF eventKind = iota
	evReadErr
	evWriteErr
	evConnErr
	evExceeded   // the quota is used up, and side sends on
	evHalfClosed // side is the conn that was half-closed, or could not be
)

// eventsMax bounds what one pair can report: a pump fails or ends once and may say before that its
// conn has failed, and each conn is watched for one failure.
const eventsMax = 10

func newPair(r *Relay, st *Stats, a, b io.ReadWriteCloser, heads [2][]byte) *pair {
	st.setEngine(Copy)
	return &pair{
		relay: r, stats: st, sides: [2]*conn{newConn(ordinary(a)), newConn(ordinary(b))}, heads: heads, m: newMachine(), gov: newGovernor(r),
		start: time.Now(), events: make(chan event, eventsMax),
	}
}

// run carries the pair to its end.
func (p *pair) run(ctx context.Context) Result {
	for s, c := range p.sides {
		s := Side(s)
		c.watch(func() { p.report(event{kind: evConnErr, side: s}) })
	}
	p.pumps.Add(2)
	go p.pump(A)
	go p.pump(B)
	p.drive(ctx)
	p.pumps.Wait()
	return result(&p.m, p.stats, time.Since(p.start))
}

// result reads the machine of a pair that is over.
func result(m *machine, st *Stats, d time.Duration) Result {
	return Result{
		AToB:     Direction{Bytes: st.moved[A].Load(), End: m.end[A], Err: m.err(A)},
		BToA:     Direction{Bytes: st.moved[B].Load(), End: m.end[B], Err: m.err(B)},
		First:    m.first,
		Duration: d,
	}
}

// report never blocks; what does not fit says nothing new.
func (p *pair) report(e event) {
	select {
	case p.events <- e:
	default:
	}
}

// drainPoll is how often the send queues of a pair that is ending are looked at.
const drainPoll = 5 * time.Millisecond

// drive runs the machine until the pair is over.
func (p *pair) drive(ctx context.Context) {
	var (
		cancel = ctx.Done()
		cause  error
		grace  <-chan time.Time
		timer  = time.NewTimer(time.Hour)
		quiet  silence
	)
	defer timer.Stop()
	for p.m.phase != over {
		wait := p.remaining(&quiet)
		if wait > 0 {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		var act action
		select {
		case e := <-p.events:
			act = p.handle(e)
		case <-timer.C:
			act = p.tick(&quiet)
		case <-cancel:
			cancel, cause = nil, context.Cause(ctx)
			if p.relay.Grace > 0 {
				grace = time.After(p.relay.Grace)
				continue
			}
			act = p.m.cancel(cause)
		case <-grace:
			act = p.m.cancel(cause)
		}
		p.do(act)
	}
}

func (p *pair) handle(e event) action {
	switch e.kind {
	case evEOF:
		return p.m.eof(e.side)
	case evReadErr:
		return p.m.readErr(e.side, e.err)
	case evWriteErr:
		return p.m.writeErr(e.side, e.err)
	case evExceeded:
		return p.m.exceeded()
	case evHalfClosed:
		return p.halfClosed(e.side, e.err)
	}
	err := e.err
	if err == nil {
		if err = p.sides[e.side].failure(); err == nil {
			return 0 // a message in the error queue
		}
	}
	return p.m.connErr(e.side, err)
}

// do carries out what the machine has asked for, in the order of the constants.
func (p *pair) do(act action) {
	for act != 0 {
		var more action
		for _, s := range [...]Side{A, B} {
			if act.has(stopA, s) {
				p.stopped[s].Store(true)
				p.sides[s].stopReading()
			}
		}
		for _, s := range [...]Side{A, B} {
			if act.has(endA, s) {
				more |= p.halfClose(s)
			}
		}
		for _, s := range [...]Side{A, B} {
			if act.has(drainA, s) {
				p.stopped[s.other()].Store(true)
				if n, ok := p.sides[s].unsent(); !ok || n == 0 {
					more |= p.m.drained()
				}
			}
		}
		for _, s := range [...]Side{A, B} {
			if act.has(closeA, s) {
				p.stopped[s.other()].Store(true)
				p.sides[s].close()
			}
			if act.has(abortA, s) {
				p.stopped[s.other()].Store(true)
				p.sides[s].abort()
			}
		}
		act = more
	}
}

func (p *pair) halfClose(s Side) action {
	if c := p.sides[s]; c.bare { // the kernel does not wait
		return p.halfClosed(s, c.closeWrite())
	}
	p.pumps.Go(func() { p.report(event{evHalfClosed, s, p.sides[s].closeWrite()}) })
	return 0
}

func (p *pair) halfClosed(s Side, err error) action {
	switch {
	case p.m.phase == over || err == nil:
	case err == ErrNoHalfClose:
		p.m.noHalfClose(s)
	default:
		return p.m.connErr(s, err)
	}
	return 0
}

// silence is what drive remembers of the time without progress.
type silence struct {
	since  time.Duration // since when there is none, after the pair's start
	limit  limit         // the limit that was in force then
	unsent [2]int        // what the send queues held then
}

// remaining returns how long to wait until the next tick; 0 for ever.
func (p *pair) remaining(q *silence) time.Duration {
	now := time.Since(p.start)
	l := p.m.limit()
	if l != q.limit {
		*q = silence{since: now, limit: l}
	}
	d := p.relay.length(l)
	if d <= 0 {
		return 0
	}
	if l == limitSettle {
		return drainPoll
	}
	return max(p.lastMove(q)+d-now, time.Nanosecond)
}

func (p *pair) lastMove(q *silence) time.Duration {
	return max(q.since, time.Duration(p.moved[A].Load()), time.Duration(p.moved[B].Load()))
}

// tick looks whether the limit has run out.
func (p *pair) tick(q *silence) action {
	now := time.Since(p.start)
	d := p.relay.length(q.limit)
	if d <= 0 {
		return 0
	}
	for s, c := range p.sides { // a send queue that changes is progress, and a full one no silence
		n, ok := c.unsent()
		if q.limit == limitSettle {
			if p.m.phase == draining && p.m.drain == Side(s) && (!ok || n == 0) {
				return p.m.drained()
			}
			if n != q.unsent[s] {
				q.unsent[s], q.since = n, now
			}
		} else if n > 0 || p.waiting[Side(s).other()].Load() {
			q.since = now
		}
	}
	if now < p.lastMove(q)+d {
		return 0
	}
	return p.m.expired()
}

// pump moves the bytes of one direction until its end.
func (p *pair) pump(s Side) {
	defer p.pumps.Done()
	defer p.recover(s)
	e := p.copy(s)
	p.report(e)
}

// recover makes a panic of a conn's method the end of its pair, and not of the process.
func (p *pair) recover(s Side) {
	if v := recover(); v != nil {
		p.report(event{kind: evReadErr, side: s, err: fmt.Errorf("%w: %v", ErrPanic, v)})
	}
}

// copy returns how the direction from s ended.
func (p *pair) copy(s Side) event {
	src, dst := p.sides[s], p.sides[s.other()]
	if head := p.heads[s]; len(head) > 0 {
		p.heads[s] = nil
		if p.gov != nil && p.gov.charge(s, len(head)) < len(head) {
			return event{evExceeded, s, ErrQuota}
		}
		if err := p.write(s, dst, head); err != nil {
			return event{evWriteErr, s, err}
		}
	}
	if l, ok := src.rwc.(lender); ok && p.gov == nil {
		return p.borrow(s, l, dst)
	}
	rd := src.newReader(dst)
	defer rd.release()
	for {
		probe := false
		if p.gov != nil {
			rd.limit, probe = p.allowed(s)
		}
		b, err := rd.read()
		exceeds := probe && len(b) > 0
		if p.gov != nil && !probe {
			n := p.gov.charge(s, len(b))
			b, exceeds = b[:n], n < len(b)
		}
		if p.stopped[s].Load() {
			return event{evReadErr, s, io.ErrClosedPipe} // nobody listens any more
		}
		if probe {
			b = b[:0]
		}
		if len(b) > 0 {
			if err != nil && err != io.EOF {
				p.report(event{evConnErr, s, err}) // so that a stalled reader cannot hold the news up
			}
			if werr := p.write(s, dst, b); werr != nil {
				return event{evWriteErr, s, werr}
			}
		}
		switch {
		case exceeds:
			return event{evExceeded, s, ErrQuota}
		case err == io.EOF:
			if src.wasReset() {
				return event{evReadErr, s, errReset}
			}
			return event{kind: evEOF, side: s}
		case err != nil:
			return event{evReadErr, s, err}
		case len(b) == 0:
			runtime.Gosched() // a Read that returned 0, nil: nothing happened
		}
	}
}

// borrow is copy for a conn that lends.
func (p *pair) borrow(s Side, l lender, dst *conn) event {
	for {
		bufs, err := l.Lend(lendSize)
		switch {
		case err == io.EOF:
			return event{kind: evEOF, side: s}
		case err != nil:
			return event{evReadErr, s, err}
		case p.stopped[s].Load():
			l.Return(0)
			return event{evReadErr, s, io.ErrClosedPipe}
		}
		if err := p.writeLent(s, l, dst, bufs); err != nil {
			return event{evWriteErr, s, err}
		}
	}
}

// writeLent writes bufs and returns them, also where a Write panics.
func (p *pair) writeLent(s Side, l lender, dst *conn, bufs [][]byte) (err error) {
	done := 0
	defer func() { l.Return(done) }()
	if !dst.bare {
		for _, b := range bufs {
			if err := p.write(s, dst, b); err != nil {
				return err
			}
			done += len(b)
		}
		return nil
	}
	p.waiting[s].Store(true)
	defer p.waiting[s].Store(false)
	v := net.Buffers(bufs)
	n, err := v.WriteTo(dst.rwc)
	if n > 0 {
		p.stats.moved[s].Add(n)
		p.moved[s].Store(int64(time.Since(p.start)))
	}
	done = int(n)
	return err
}

// allowed waits until some bytes may be read from s, and returns how many.
func (p *pair) allowed(s Side) (n int, probe bool) {
	for {
		n, probe = p.gov.allowed(s, largeSize, clock())
		if n > 0 || p.stopped[s].Load() {
			p.waiting[s].Store(false)
			return max(n, 1), probe
		}
		p.waiting[s].Store(true) // being held back is no silence
		time.Sleep(throttleTick)
	}
}

// write writes all of b, as io.Copy would.
func (p *pair) write(s Side, dst *conn, b []byte) error {
	p.waiting[s].Store(true)
	defer p.waiting[s].Store(false)
	for len(b) > 0 {
		n, err := dst.rwc.Write(b)
		if n < 0 || n > len(b) {
			return errInvalidWrite
		}
		if n > 0 {
			p.stats.moved[s].Add(int64(n))
			p.moved[s].Store(int64(time.Since(p.start)))
			b = b[n:]
		}
		if err != nil {
			return err
		}
		if len(b) > 0 && n == 0 {
			return io.ErrShortWrite
		}
	}
	return nil
}
