package outbound

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Start begins to check the members, if there is something to check them by. A second call does nothing.
func (g *Group) Start() error {
	if !g.checks() {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stop != nil {
		return nil
	}
	g.prepare()
	ctx, stop := context.WithCancel(context.Background())
	g.stop = stop
	g.all.Go(func() { g.watch(ctx) })
	return nil
}

// Close ends the checks. Conns through the members go on.
func (g *Group) Close() error {
	g.mu.Lock()
	stop := g.stop
	g.mu.Unlock()
	if stop != nil {
		stop()
	}
	g.all.Wait()
	return nil
}

// watch checks the members in rounds: while the group is used, or always. A dial without an answer brings the next
// round forward.
func (g *Group) watch(ctx context.Context) {
	for {
		if !g.Keep {
			select {
			case <-ctx.Done():
				return
			case <-g.used:
			}
		}
		g.checkAll(ctx)
		pause := min(checkPause, g.interval())
		if !sleep(ctx, pause, nil) || !sleep(ctx, jitter(g.interval())-pause, g.doubt) {
			return
		}
	}
}

// jitter returns d more or less a tenth, so that the checks of many do not come at once.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// sleep returns after d, or earlier when something comes from early; false when ctx is over.
func sleep(ctx context.Context, d time.Duration, early <-chan struct{}) bool {
	timer := time.NewTimer(max(0, d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-early:
	}
	return true
}

// checkAll checks all members at once and returns when the last one has its result.
func (g *Group) checkAll(ctx context.Context) {
	var all sync.WaitGroup
	for _, m := range g.members {
		all.Go(func() { g.check(ctx, m) })
	}
	all.Wait()
}

// check connects to the place of the checks through m. A refusal from there is as good as a connection.
func (g *Group) check(ctx context.Context, m *member) {
	attempt, cancel := context.WithTimeoutCause(ctx, checkTimeout, context.DeadlineExceeded)
	defer cancel()
	begin := time.Now()
	c, err := m.Dialer.DialStream(attempt, g.Check)
	took := time.Since(begin)
	if err == nil {
		c.Close()
	}
	if ctx.Err() != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil && (verdictOf(err) != final || proxy.ReasonOf(err) != proxy.Refused) {
		g.setDown(m, err)
		return
	}
	g.setUp(m)
	if m.latency == 0 {
		m.latency = max(1, took)
	} else {
		m.latency = max(1, m.latency+(took-m.latency)/4)
	}
}
