package relaytest

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
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
// are all [Legs]. The test's log says which scenarios a mix leaves out.
func RunOver(t *testing.T, o Options, join func(ctx context.Context, client, origin io.ReadWriteCloser), legs ...Leg) {
	t.Helper()
	if len(legs) == 0 {
		legs = Legs()
	}
	for _, client := range legs {
		for _, origin := range legs {
			t.Run(client.Name+"-"+origin.Name, func(t *testing.T) { RunBed(t, Joined(client, origin, join), o) })
		}
	}
}

// RunBed plays on b all scenarios that its legs can carry, each as a subtest. Those that measure
// come first, one by one; the others are parallel subtests and run on when RunBed returns. So what b
// needs is best released by t.Cleanup.
func RunBed(t *testing.T, b Bed, o Options) {
	t.Helper()
	var left []string
	for _, s := range Scenarios() {
		if why := s.LeftOut(b); why != "" {
			left = append(left, fmt.Sprintf("%s: %s", s.Name, why))
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			if !s.Alone {
				t.Parallel()
			}
			v := Check(t.Context(), b, s, o)
			for _, note := range v.Notes {
				t.Log(note)
			}
			if v.Err != nil {
				t.Errorf("A relay %s see to it that %s.\n%v", s.Level, s.Meaning, v.Err)
			}
		})
	}
	if len(left) > 0 {
		t.Logf("left out:\n\t%s", strings.Join(left, "\n\t"))
	}
}
