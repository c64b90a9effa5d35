package relaytest

import (
	"cmp"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// Run plays all scenarios, each as a subtest, on join, over TCP. Join is called in a goroutine of
// its own for every connection; it owns both conns, closes them, and returns when that is done. Its
// context is never cancelled.
//
// Several scenarios are played at a time. Since a busy machine can make a relay late, what has failed beside others is
// played again by itself, and then the second verdict counts; the first is logged.
//
// Run measures the process, so that the test that calls it must not run in parallel with others.
func Run(t *testing.T, join func(ctx context.Context, client, origin net.Conn)) {
	t.Helper()
	RunBed(t, Joined(TCP(), TCP(), func(ctx context.Context, client, origin io.ReadWriteCloser) {
		join(ctx, client.(net.Conn), origin.(net.Conn))
	}), Options{})
}

// RunOver does as [Run] over every leg to every leg, with one subtest for each of the mixes; no legs
// are all [Legs]. Since there are many mixes, sizes that o leaves zero are smaller than elsewhere,
// and what has to be measured is measured between legs of one kind only. The test's log says which
// scenarios a mix cannot carry.
func RunOver(t *testing.T, o Options, join func(ctx context.Context, client, origin io.ReadWriteCloser), legs ...Leg) {
	t.Helper()
	if len(legs) == 0 {
		legs = Legs()
	}
	o.Bytes = cmp.Or(o.Bytes, 512<<10)
	o.Rounds = cmp.Or(o.Rounds, 20)
	o.Silence = cmp.Or(o.Silence, 100*time.Millisecond)
	var runs []*run
	for _, client := range legs {
		for _, origin := range legs {
			r := newRun(client.Name+"-"+origin.Name, Joined(client, origin, join), o)
			if client.Name != origin.Name {
				r.alone = nil
			}
			runs = append(runs, r)
		}
	}
	playAll(t.Context(), runs)
	for _, r := range runs {
		t.Run(r.name, r.report)
	}
}

// RunBed plays on b all scenarios that its legs can carry, and reports each as a subtest. Several
// are played at a time, and all of them before the first is reported, so that to select one takes
// [Options.Only] and not go test's -run. Those that measure are played one by one.
func RunBed(t *testing.T, b Bed, o Options) {
	t.Helper()
	r := newRun("", b, o)
	playAll(t.Context(), []*run{r})
	r.report(t)
}

// run is what is played on one bed.
type run struct {
	name     string
	bed      Bed
	options  Options
	together []Scenario
	alone    []Scenario
	left     []string  // what the bed cannot carry, and why
	verdicts []Verdict // of together
}

func newRun(name string, b Bed, o Options) *run {
	r := &run{name: name, bed: b, options: o}
	for _, s := range Scenarios() {
		switch why := s.LeftOut(b, o); {
		case !strings.Contains(s.Name, o.Only):
		case why != "":
			r.left = append(r.left, s.Name+": "+why)
		case s.Alone:
			r.alone = append(r.alone, s)
		default:
			r.together = append(r.together, s)
		}
	}
	r.verdicts = make([]Verdict, len(r.together))
	return r
}

// playAll plays what can be played together.
func playAll(ctx context.Context, runs []*run) {
	var plays []func()
	for _, r := range runs {
		for i, s := range r.together {
			plays = append(plays, func() { r.verdicts[i] = Check(ctx, r.bed, s, r.options) })
		}
	}
	atATime(plays)
}

// report reports what has been played, and plays the rest.
func (r *run) report(t *testing.T) {
	for _, v := range r.verdicts {
		t.Run(v.Scenario.Name, func(t *testing.T) {
			if v.Err != nil && t.Context().Err() == nil {
				t.Logf("beside others, after %v: %v", v.Took.Round(time.Millisecond), v.Err)
				v = Check(t.Context(), r.bed, v.Scenario, r.options)
			}
			v.report(t)
		})
	}
	for _, s := range r.alone {
		t.Run(s.Name, func(t *testing.T) { Check(t.Context(), r.bed, s, r.options).report(t) })
	}
	if len(r.left) > 0 {
		t.Logf("left out:\n\t%s", strings.Join(r.left, "\n\t"))
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
