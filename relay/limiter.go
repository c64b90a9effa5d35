package relay

import (
	"slices"
	"sync"
	"time"
)

// Limiter is a limit in bytes a second that any number of relays share. It starts empty and never
// holds more than a tenth of a second's bytes, so that nobody gets more than the rate for longer than that.
// Who has to wait is served in turn: none of those that share it can take it all.
// Its methods may be called from any goroutine.
type Limiter struct {
	rate int64

	mu   sync.Mutex
	left int64 // may be negative: what was moved too much is paid before anything else moves
	last int64 // when left was true, as clock tells it

	queue []*place // those that wait, who is next first
}

// place is that of a direction in the queue of a limit that is shared.
type place struct {
	waits bool  // is in the queue
	asked int64 // the last time
	turn  int64 // how many bytes are left of its turn
}

// placeLost is how long after it has asked the last time a place is given away: long enough that a busy loop comes
// to ask, and short beside what a limit holds.
const placeLost = 10 * throttleTick

// NewLimiter returns a limit of that many bytes a second, which must be more than 0.
func NewLimiter(bytesPerSecond int64) *Limiter {
	if bytesPerSecond <= 0 {
		panic("relay: NewLimiter: the limit must be more than 0")
	}
	return &Limiter{rate: bytesPerSecond, last: clock()}
}

// Rate returns the limit in bytes a second.
func (l *Limiter) Rate() int64 { return l.rate }

// allowed returns how many bytes may be moved now; none if it is not positive.
func (l *Limiter) allowed(now int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fill(now)
}

// fill adds what the time has brought, and returns what is left. The lock is held.
func (l *Limiter) fill(now int64) int64 {
	burst := max(l.rate/10, 1)
	// In floating point, as the product of a high rate and a long silence is in no integer's range.
	switch add := float64(l.rate) * float64(now-l.last) / float64(time.Second); {
	case add >= float64(burst-l.left):
		l.left, l.last = burst, now
	case add >= 1:
		l.left += int64(add)
		l.last = now
	} // else it is too little to count, and stays on the clock
	return l.left
}

// allowedTo is allowed for one of many. Where others wait it is 0 but for the first of them, whose turn is all there is, once
// that is worth a turn: what a tick brings. But where much is left unused nobody waits.
func (l *Limiter) allowedTo(p *place, now int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	left := l.fill(now)
	if now-p.asked > int64(throttleTick) {
		p.turn = 0
	}
	p.asked = now
	for len(l.queue) > 0 && now-l.queue[0].asked > int64(placeLost) { // has ended, or has nothing to move any more
		l.leave(l.queue[0])
	}
	worth := max(int64(float64(l.rate)*throttleTick.Seconds()), 1)
	switch {
	case min(left, p.turn) > 0:
		return min(left, p.turn)
	case len(l.queue) == 0 && left > 0, p.waits && l.queue[0] == p && left >= worth, left > l.rate/20:
		l.leave(p)
		p.turn = left
		return left
	case !p.waits:
		p.waits = true
		l.queue = append(l.queue, p)
	}
	return 0
}

// leave takes p out of the queue, if it is there.
func (l *Limiter) leave(p *place) {
	switch {
	case !p.waits:
		return
	case l.queue[0] == p: // with thousands behind it
		l.queue[0] = nil
		l.queue = l.queue[1:]
	default:
		l.queue = slices.DeleteFunc(l.queue, func(q *place) bool { return q == p })
	}
	p.waits = false
}

// chargeTo is charge for one of many.
func (l *Limiter) chargeTo(p *place, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left -= int64(n)
	p.turn -= int64(n)
}

func (l *Limiter) charge(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left -= int64(n)
}

// clock returns nanoseconds since epoch.
func clock() int64 { return int64(time.Since(epoch)) }

var epoch = time.Now()

// governor is what limits the bytes of one pair.
type governor struct {
	ways   [2]*Limiter // by source; nil: no limit of the pair's own
	shared *Limiter    // may be nil
	places [2]place    // in its queue, by source; its lock guards them
	limit  int64       // the quota; 0: none

	mu    sync.Mutex
	moved int64 // of the quota
}

// newGovernor returns what r limits, nil for nothing.
func newGovernor(r *Relay) *governor {
	if r.Rate <= 0 && r.Shared == nil && r.Quota <= 0 {
		return nil
	}
	g := &governor{shared: r.Shared, limit: max(r.Quota, 0)}
	if r.Rate > 0 {
		g.ways = [2]*Limiter{NewLimiter(r.Rate), NewLimiter(r.Rate)}
	}
	return g
}

// throttleTick is how often a direction that must wait looks again.
const throttleTick = 5 * time.Millisecond

// allowed returns how many of max bytes may be read from s now, 0 for none yet.
// probe says that the quota is used up, so that even the one byte that may be read must not be passed on: its coming
// ends the pair, and only an end is still passed on.
func (g *governor) allowed(s Side, max int, now int64) (n int, probe bool) {
	left := int64(max)
	if l := g.ways[s]; l != nil {
		left = min(left, l.allowed(now))
	}
	if g.shared != nil && left > 0 {
		left = min(left, g.shared.allowedTo(&g.places[s], now))
	}
	if g.limit > 0 {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.moved >= g.limit {
			return 1, true
		}
		left = min(left, g.limit-g.moved)
	}
	if left < 0 {
		left = 0
	}
	return int(left), false
}

// charge counts n bytes read from s and returns how many of them may be passed on: fewer, where the other
// direction has used up the quota meanwhile.
func (g *governor) charge(s Side, n int) int {
	if l := g.ways[s]; l != nil {
		l.charge(n)
	}
	if g.shared != nil {
		g.shared.chargeTo(&g.places[s], n)
	}
	if g.limit > 0 {
		g.mu.Lock()
		defer g.mu.Unlock()
		n = int(min(int64(n), g.limit-g.moved))
		g.moved += int64(n)
	}
	return n
}
