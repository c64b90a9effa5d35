package relaytest

import (
	"context"
	"strings"
	"sync"
	"time"
)

// CheckAll plays all scenarios on b, outside of package testing, and returns their verdicts, those
// that were left out among them, in the order of [Scenarios]. Several are played at a time; those
// that measure come last, one by one. Since a busy machine can make a relay late, what has failed
// beside others is played again, and then the second verdict counts: by itself, or, if it has taken more
// than 5 s, beside its like.
//
// Tell, if it is not nil, gets each verdict as soon as it is final; it is called by one goroutine at
// a time. Where ctx ends early, so do the scenarios, which fail.
func CheckAll(ctx context.Context, b Bed, o Options, tell func(Verdict)) []Verdict {
	c := &checking{ctx: ctx, bed: b, options: o, tell: tell}
	var together, slow, again, alone []int
	for _, s := range Scenarios() {
		if !strings.Contains(s.Name, o.Only) {
			continue
		}
		i := len(c.verdicts)
		v := Verdict{Scenario: s, LeftOut: s.LeftOut(b, o)}
		c.verdicts = append(c.verdicts, v)
		switch {
		case v.LeftOut != "":
			c.final(i)
		case s.Alone:
			alone = append(alone, i)
		default:
			together = append(together, i)
		}
	}
	c.playTogether(together, func(i int) bool { return c.verdicts[i].Err == nil || ctx.Err() != nil })
	for _, i := range together {
		switch v := c.verdicts[i]; {
		case v.Err == nil || ctx.Err() != nil:
		case v.Took < 5*time.Second:
			again = append(again, i)
		default:
			slow = append(slow, i)
		}
	}
	c.playTogether(slow, func(int) bool { return true })
	for _, i := range append(again, alone...) {
		c.play(i)
		c.final(i)
	}
	return c.verdicts
}

type checking struct {
	ctx      context.Context
	bed      Bed
	options  Options
	verdicts []Verdict

	mu   sync.Mutex
	tell func(Verdict)
}

func (c *checking) play(i int) {
	c.verdicts[i] = Check(c.ctx, c.bed, c.verdicts[i].Scenario, c.options)
}

// playTogether plays some, and tells of those that are final then.
func (c *checking) playTogether(which []int, final func(i int) bool) {
	var plays []func()
	for _, i := range which {
		plays = append(plays, func() {
			if c.play(i); final(i) {
				c.final(i)
			}
		})
	}
	atATime(plays)
}

func (c *checking) final(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tell != nil {
		c.tell(c.verdicts[i])
	}
}

// atATime calls all plays, a few at a time: most of them wait most of the time.
func atATime(plays []func()) {
	const lanes = 8
	next := make(chan func())
	var all sync.WaitGroup
	for range lanes {
		all.Go(func() {
			for play := range next {
				play()
			}
		})
	}
	for _, play := range plays {
		next <- play
	}
	close(next)
	all.Wait()
}
