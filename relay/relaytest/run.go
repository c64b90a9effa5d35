package relaytest

import (
	"cmp"
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Run plays all scenarios, each as a subtest, on join, over TCP. Join is called in a goroutine of
// its own for every connection; it owns both conns, closes them, and returns when that is done. Its
// context is never cancelled.
//
// Run measures the process, so that the test that calls it must not run in parallel with others.
func Run(t *testing.T, join func(ctx context.Context, client, origin net.Conn)) {
	t.Helper()
	RunBed(t, Joined(TCP(), TCP(), func(ctx context.Context, client, origin io.ReadWriteCloser) {
		join(ctx, client.(net.Conn), origin.(net.Conn))
	}), Options{})
}

// RunOver does as [Run] over every leg to every leg, with one subtest for each of the mixes; no legs
// are all [Legs]. Sizes that o leaves zero are smaller than elsewhere, for there are many mixes. The
// test's log says which scenarios a mix leaves out.
func RunOver(t *testing.T, o Options, join func(ctx context.Context, client, origin io.ReadWriteCloser), legs ...Leg) {
	t.Helper()
	if len(legs) == 0 {
		legs = Legs()
	}
	o.Bytes = cmp.Or(o.Bytes, 512<<10)
	o.Rounds = cmp.Or(o.Rounds, 20)
	o.Silence = cmp.Or(o.Silence, 100*time.Millisecond)
	for _, client := range legs {
		for _, origin := range legs {
			t.Run(client.Name+"-"+origin.Name, func(t *testing.T) { RunBed(t, Joined(client, origin, join), o) })
		}
	}
}

// RunBed plays on b all scenarios that its legs can carry, and reports each as a subtest. Several
// are played at a time, and all of them before the first is reported, so that to select one takes
// [Options.Only] and not go test's -run. Those that measure are played one by one.
func RunBed(t *testing.T, b Bed, o Options) {
	t.Helper()
	const lanes = 8
	var play, alone []Scenario
	var left []string
	for _, s := range Scenarios() {
		switch why := s.LeftOut(b); {
		case !strings.Contains(s.Name, o.Only):
		case why != "":
			left = append(left, s.Name+": "+why)
		case s.Alone:
			alone = append(alone, s)
		default:
			play = append(play, s)
		}
	}
	verdicts := make([]Verdict, len(play))
	var next atomic.Int64
	var all sync.WaitGroup
	for range lanes {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(play)); i = next.Add(1) - 1 {
				verdicts[i] = Check(t.Context(), b, play[i], o)
			}
		})
	}
	all.Wait()
	for _, v := range verdicts {
		t.Run(v.Scenario.Name, v.report)
	}
	for _, s := range alone {
		t.Run(s.Name, func(t *testing.T) { Check(t.Context(), b, s, o).report(t) })
	}
	if len(left) > 0 {
		t.Logf("left out:\n\t%s", strings.Join(left, "\n\t"))
	}
}

func (v Verdict) report(t *testing.T) {
	for _, note := range v.Notes {
		t.Log(note)
	}
	if v.Err != nil {
		t.Errorf("%v, after %v\nA relay %v keep this: %s.",
			v.Err, v.Took.Round(time.Millisecond), v.Scenario.Level, v.Scenario.Meaning)
	}
}
