package outbound

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// Policy says which member of a [Group] is tried first.
type Policy uint8

// The policies. All try those that are up before those that are down.
const (
	Fallback     Policy = iota // the first one that is up
	RoundRobin                 // each in turn, flow by flow
	LeastLatency               // the one whose checks are quickest; another has to be clearly quicker to take its place
)

// The defaults of a Group.
const (
	DefaultCheckInterval = 30 * time.Second
	checkTimeout         = 5 * time.Second // of one check, also where the interval is shorter: rounds do not overlap
	checkPause           = time.Second     // between two rounds of checks at least, or the interval if that is shorter
	doubtsMost           = 3               // dials in a row without an answer, where there are no checks
)

// Group is several ways out that do the same: its members. A dial is given to one of them, and to the next one where
// that is for a reason of the member and not of the destination: what cannot be reached, breaks off, does not let us
// in, or does not answer. A hop's word that the destination refuses, does not exist or is not allowed is final. Where it says
// that it knows no way there, or that there was no answer, the next member is tried, too. Each attempt has its
// share of the time that is left.
//
// A member that cannot be reached, or three times in a row does not answer, is down: it is tried after all
// others. With Check, the checks decide when it is up again, and whether one that does not answer is down; without, a flow tries it
// again each Interval.
type Group struct {
	Name     string
	Members  []Member // at least one
	Policy   Policy
	Check    proxy.Addr    // what each member is made to connect to, to see whether it is up; zero: nothing
	Interval time.Duration // between checks; 0: DefaultCheckInterval
	Keep     bool          // check also while nobody uses the group
	Log      *slog.Logger  // for what goes down and comes up; nil: silent

	mu      sync.Mutex
	members []*member // made of Members at first use
	turn    uint      // of RoundRobin
	best    *member   // of LeastLatency

	used, doubt chan struct{} // wake watch; each holds one
	stop        context.CancelFunc
	all         sync.WaitGroup
}

// Member is one way out of a [Group].
type Member struct {
	Name   string
	Dialer proxy.Dialer
}

// member is a Member and what is known of it. The group's lock guards it.
type member struct {
	Member
	down    bool
	since   time.Time     // when it went down
	retry   time.Time     // when a flow tries it again although it is down
	doubts  int           // dials without an answer since the last answer
	latency time.Duration // of checks, smoothed; 0: unknown
}

var (
	_ proxy.PacketDialer = (*Group)(nil)
	_ proxy.Binder       = (*Group)(nil)
)

// DialStream implements [proxy.Dialer]. The conn is the member's own. The error names the members that were tried and has
// the reason of the last.
func (g *Group) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	return tryMembers(ctx, g, verdictOf, func(ctx context.Context, d proxy.Dialer) (net.Conn, error) {
		return d.DialStream(ctx, dst)
	})
}

// DialPackets implements [proxy.PacketDialer], with the members that do.
func (g *Group) DialPackets(ctx context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	return tryMembers(ctx, g, packetVerdictOf, func(ctx context.Context, d proxy.Dialer) (relay.PacketConn, error) {
		if p, ok := d.(proxy.PacketDialer); ok {
			return p.DialPackets(ctx, dst)
		}
		return nil, fmt.Errorf("carries no datagrams: %w", errors.ErrUnsupported)
	})
}

// Bind implements [proxy.Binder], with the members that do. The listener is the member's own.
func (g *Group) Bind(ctx context.Context, from proxy.Addr) (net.Listener, error) {
	// Time is short for the members to listen, and not for the stream to come.
	trying, cancel := context.WithTimeoutCause(ctx, proxy.DefaultDialTimeout, context.DeadlineExceeded)
	defer cancel()
	return tryMembers(trying, g, packetVerdictOf, func(attempt context.Context, d proxy.Dialer) (net.Listener, error) {
		if b, ok := d.(proxy.Binder); ok {
			return bindWithin(ctx, attempt, b, from)
		}
		return nil, fmt.Errorf("cannot wait for streams: %w", errors.ErrUnsupported)
	})
}

// bindWithin has b listen before the attempt is over. The listener ends with ctx.
func bindWithin(ctx, attempt context.Context, b proxy.Binder, from proxy.Addr) (net.Listener, error) {
	listening, cancel := context.WithCancelCause(ctx) // ends with ctx, as the listener does
	stop := context.AfterFunc(attempt, func() { cancel(context.Cause(attempt)) })
	ln, err := b.Bind(listening, from)
	if err == nil && !stop() {
		ln.Close()
		ln, err = nil, fmt.Errorf("no answer: %w", context.Cause(attempt))
	}
	if err != nil {
		stop()
		cancel(err)
	}
	return ln, err
}

// tryMembers dials through one member after the other, as far as judge says of the error of each.
func tryMembers[C any](ctx context.Context, g *Group, judge func(error) verdict,
	dial func(context.Context, proxy.Dialer) (C, error)) (none C, _ error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(proxy.DefaultDialTimeout)
	}
	order, up := g.order()
	var failed error
	for i, m := range order {
		left := up - i // members that share the time: those that are down get what the others leave
		if left <= 0 {
			left = len(order) - i
		}
		attempt, cancel := context.WithTimeoutCause(ctx, time.Until(deadline)/time.Duration(left), context.DeadlineExceeded)
		c, err := dial(attempt, m.Dialer)
		cancel()
		if err != nil && errors.Is(ctx.Err(), context.Canceled) {
			return none, fmt.Errorf("outbound: group %s: %s: %w", g.Name, m.Name, err) // which says nothing of the member
		}
		v := judge(err)
		g.note(m, v, err)
		if err == nil {
			return c, nil
		}
		err = fmt.Errorf("%s: %w", m.Name, err)
		switch {
		case failed == nil:
			failed = err
		case v != unable: // which says less than any other
			failed = fmt.Errorf("%w (before that, %v)", err, failed)
		}
		if v == final || ctx.Err() != nil || !time.Now().Before(deadline) {
			break
		}
	}
	return none, fmt.Errorf("outbound: group %s: %w", g.Name, failed)
}

// order returns the members in the order in which a flow tries them, and how many of them are up.
func (g *Group) order() (order []*member, up int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prepare()
	wake(g.used)
	now := time.Now()
	var down []*member
	order = make([]*member, 0, len(g.members))
	for _, m := range g.members {
		if m.down && (g.checks() || now.Before(m.retry)) {
			down = append(down, m)
		} else {
			order = append(order, m)
		}
	}
	up = len(order)
	switch {
	case up == 0:
	case g.Policy == RoundRobin:
		g.turn++
		i := int((g.turn - 1) % uint(up))
		order = append(slices.Clone(order[i:]), order[:i]...)
	case g.Policy == LeastLatency:
		g.sortByLatency(order)
	}
	if up > 0 && order[0].down {
		order[0].retry = now.Add(g.interval()) // this flow tries it again; others need not wait for what becomes of that
	}
	return append(order, down...), up
}

// sortByLatency puts the best of the members first, then the others, quickest first and those not known last.
func (g *Group) sortByLatency(up []*member) {
	slices.SortStableFunc(up, func(a, b *member) int {
		if (a.latency == 0) != (b.latency == 0) {
			return cmp.Compare(b.latency, a.latency)
		}
		return cmp.Compare(a.latency, b.latency)
	})
	i := slices.Index(up, g.best)
	if i < 0 || g.best.latency == 0 || clearlyLess(up[0].latency, g.best.latency) {
		g.best = up[0]
		return
	}
	copy(up[1:i+1], up[:i])
	up[0] = g.best
}

// clearlyLess says whether going over from b to a is worth it: latencies vary, and a group that follows each change
// spreads what belongs together.
func clearlyLess(a, b time.Duration) bool { return a < b-b/5 && b-a >= time.Millisecond }

// note remembers what a dial says of a member.
func (g *Group) note(m *member, v verdict, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.down {
		m.retry = time.Now().Add(g.interval())
	}
	switch v {
	case final, elsewhere:
		m.doubts = 0
		if !g.checks() {
			g.setUp(m)
		}
	case doubtful:
		wake(g.doubt)
		if m.doubts++; m.doubts >= doubtsMost && !g.checks() {
			g.setDown(m, err)
		}
	case broken:
		g.setDown(m, err)
	}
}

func (g *Group) setDown(m *member, err error) {
	if m.down {
		return
	}
	m.down, m.since = true, time.Now()
	m.retry = m.since.Add(g.interval())
	m.latency = 0
	if g.Log != nil {
		g.Log.Warn("a way out is down", "group", g.Name, "member", m.Name, "up", g.countUp(), "err", err)
	}
}

func (g *Group) setUp(m *member) {
	m.doubts = 0
	if !m.down {
		return
	}
	m.down = false
	if g.Log != nil {
		g.Log.Info("a way out is up again", "group", g.Name, "member", m.Name, "up", g.countUp(),
			"after", time.Since(m.since).Round(time.Millisecond))
	}
}

// countUp says how many members are up, as in 1/2.
func (g *Group) countUp() string {
	n := 0
	for _, m := range g.members {
		if !m.down {
			n++
		}
	}
	return fmt.Sprintf("%d/%d", n, len(g.members))
}

func (g *Group) checks() bool { return g.Check != proxy.Addr{} }

func (g *Group) interval() time.Duration { return cmp.Or(g.Interval, DefaultCheckInterval) }

// prepare makes what the zero value lacks. The lock is held.
func (g *Group) prepare() {
	if g.members != nil {
		return
	}
	for _, m := range g.Members {
		g.members = append(g.members, &member{Member: m})
	}
	g.used, g.doubt = make(chan struct{}, 1), make(chan struct{}, 1)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // is about to
	}
}
