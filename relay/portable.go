package relay

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// The portable engine: for each direction a goroutine, the pump, that reads and writes; and turns, which drive
// the machine: they alone decide, close and keep the time. A pump reports and obeys. A pump that waits in a
// conn that has no deadlines is freed by closing the conn.
//
// One goroutine at a time takes turns, for as long as there is something to do: a pair that only moves bytes has
// none but its pumps.

// pair is a joined pair under the portable engine.
type pair struct {
	relay *Relay
	stats *Stats
	sides [2]*conn
	heads [2][]byte
	m     machine
	gov   *governor // nil: no limits on its bytes
	start time.Time
	done  func(Result) // may be nil
	quiet silence      // of who takes the turns, as the machine and the timer are
	timer *time.Timer
	pumps sync.WaitGroup

	mu      sync.Mutex
	reports []event // to be handled
	turning bool    // somebody takes turns

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
	evTick       // the time is to be looked at
	evCanceled   // err is why
)

// eventsMax bounds what one pair can report: a pump fails or ends once and may say before that its
// conn has failed, each conn is watched for one failure, and the time comes once until it was looked at. Nothing matters
// after a cancellation.
const eventsMax = 12

func newPair(r *Relay, st *Stats, a, b io.ReadWriteCloser, heads [2][]byte, done func(Result)) *pair {
	st.setEngine(Copy)
	return &pair{
		relay: r, stats: st, sides: [2]*conn{newConn(ordinary(a)), newConn(ordinary(b))}, heads: heads, m: newMachine(), gov: newGovernor(r),
		done: done, start: time.Now(),
	}
}

// begin starts the pair. Its end is told to done, on a goroutine of the pair's.
func (p *pair) begin() *Pair {
	p.turning = true // nobody else, before all is set up
	for s, c := range p.sides {
		s := Side(s)
		c.watch(func() { p.report(event{kind: evConnErr, side: s}) })
	}
	p.pumps.Add(2)
	go p.pump(A)
	go p.pump(B)
	p.timer = time.AfterFunc(time.Hour, p.ticks)
	p.arm()
	if !p.rest() {
		go p.turns()
	}
	return &Pair{p}
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

// report has e handled. It never blocks.
func (p *pair) report(e event) {
	if p.put(e) {
		go p.turns()
	}
}

// put puts e among what is to be handled, and says whether the caller is to take the turns. What does not
// fit says nothing new.
func (p *pair) put(e event) (mine bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.reports) < eventsMax {
		p.reports = append(p.reports, e)
	}
	mine = !p.turning
	p.turning = true
	return mine
}

// rest ends the caller's turns, unless there is something to handle.
func (p *pair) rest() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turning = len(p.reports) > 0
	if !p.turning {
		p.reports = nil
	}
	return !p.turning
}

func (p *pair) next() event {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.reports[0]
	p.reports = p.reports[1:]
	return e
}

// turns handles what was reported, until there is nothing more or the pair is over. Nobody takes turns after that.
func (p *pair) turns() {
	for !p.rest() {
		p.do(p.handle(p.next()))
		if p.m.phase == over {
			p.finish()
			return
		}
		p.arm()
	}
}

func (p *pair) finish() {
	p.timer.Stop()
	p.pumps.Wait()
	if p.done != nil {
		p.done(result(&p.m, p.stats, time.Since(p.start)))
	}
}

// drainPoll is how often the send queues of a pair that is ending are looked at.
const drainPoll = 5 * time.Millisecond

// arm has the time looked at when something may be due.
func (p *pair) arm() {
	if wait := p.remaining(&p.quiet); wait > 0 {
		p.timer.Reset(wait)
	} else {
		p.timer.Stop()
	}
}

func (p *pair) ticks() { p.report(event{kind: evTick}) }

func (p *pair) abortPair(cause error) { p.report(event{kind: evCanceled, err: cause}) }

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
	case evTick:
		return p.tick(&p.quiet)
	case evCanceled:
		return p.m.cancel(e.err)
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

// silence is what turns remember of the time without progress.
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
	if d <= 0 || q.limit != p.m.limit() { // it was for a limit that is not in force any more
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
	e := p.carry(s)
	p.pumps.Done() // the last turn waits for it, and may be this one
	if p.put(e) {
		p.turns()
	}
}

// carry is copy, where a panic of a conn's method is the end of its pair, and not of the process.
func (p *pair) carry(s Side) (e event) {
	defer func() {
		if v := recover(); v != nil {
			e = event{kind: evReadErr, side: s, err: fmt.Errorf("%w: %v", ErrPanic, v)}
		}
	}()
	return p.copy(s)
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
