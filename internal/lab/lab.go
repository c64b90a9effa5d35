// Package lab shows why the relay of four lines is wrong. It has the known ways to write one, each as
// a few lines of Go, and plays the scenarios of relay/relaytest on all of them, with a record of who sent
// what, who saw what, and when.
//
// [Relays] lists them. [Run] plays the scenarios and returns a [Table]: it can be written as text, and
// as a web page with the code of each relay and a sequence diagram of each of its failures.
package lab

import (
	"cmp"
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// Relay is one way to write a relay.
type Relay struct {
	Name   string // one word, as on the command line
	Title  string // what it does, in a few words
	Origin string // where it is known from
	Right  bool   // it is not wrong
	code   string // the function that is shown
	fresh  func() joinFunc
}

type joinFunc func(client, origin *net.TCPConn)

// same is for a relay that keeps nothing from one connection to the next.
func same(f joinFunc) func() joinFunc { return func() joinFunc { return f } }

// Relays returns the relays, from the worst to the right one.
func Relays() []*Relay {
	return []*Relay{
		{Name: "two-copies", Title: "two copies that wait for each other", code: "twoCopies", fresh: same(twoCopies),
			Origin: "the first relay that everybody writes; found in tutorials in every language"},
		{Name: "shared-remote", Title: "one remote for all clients", code: "sharedRemote",
			fresh:  func() joinFunc { return sharedRemote() },
			Origin: "SSH port forwards in Go, after an article of 2015 that is still copied"},
		{Name: "close-peer", Title: "an end of one side closes the other", code: "closePeer", fresh: same(closePeer),
			Origin: "answers on the web to \"TCP proxy in Go\""},
		{Name: "close-both", Title: "the first end closes both, with a pooled buffer", code: "closeBothPooled",
			fresh: same(closeBothPooled), Origin: "the way of frp's Join"},
		{Name: "either-done", Title: "the first end closes both, with recover and hexdump", code: "eitherDone",
			fresh: same(eitherDone), Origin: "the way of cloudflared's stream pipe"},
		{Name: "deadline", Title: "an end of one side is a deadline for the other", code: "deadlineOnEOF",
			fresh: same(deadlineOnEOF), Origin: "the way of clash's relay"},
		{Name: "half-close-deadline", Title: "half-close, and a deadline for the rest", code: "halfCloseDeadline",
			fresh: same(halfCloseDeadline), Origin: "the way of tun2socks"},
		{Name: "close-read", Title: "half-close, and stop reading", code: "closeReadWrite", fresh: same(closeReadWrite),
			Origin: "the way of go-tun2socks"},
		{Name: "half-close", Title: "half-close both ways", code: "halfClose", fresh: same(halfClose),
			Origin: "the way of careful relays, such as socat, and nginx with proxy_half_close"},
		{Name: "sluice", Title: "every end as what it was", code: "sluice", fresh: same(sluice),
			Origin: "this program: relay.Join", Right: true},
	}
}

// Find returns the relay of that name, or nil.
func Find(name string) *Relay {
	for _, r := range Relays() {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// bed has a relay that has carried nothing before.
func (r *Relay) bed() relaytest.Bed {
	join := r.fresh()
	return relaytest.Joined(relaytest.TCP(), relaytest.TCP(), func(_ context.Context, client, origin io.ReadWriteCloser) {
		join(client.(*net.TCPConn), origin.(*net.TCPConn))
	})
}

// sizes make a hang a failure soon. The silences are to those of the real relays as 300 ms to a few minutes.
func sizes() relaytest.Options {
	return relaytest.Options{
		Bytes: 1 << 20, Rounds: 20, Silence: 300 * time.Millisecond, Prompt: 400 * time.Millisecond, Timeout: 2500 * time.Millisecond,
	}
}

// Finding is what one scenario has shown of one relay.
type Finding struct {
	Relay *Relay
	relaytest.Verdict
	Events []relaytest.Event // in order; long runs of the same are one
}

// Failed says whether the relay has failed.
func (f *Finding) Failed() bool { return f.Err != nil }

// Table is what the scenarios have shown of the relays.
type Table struct {
	Relays    []*Relay
	Scenarios []relaytest.Scenario
	Findings  [][]*Finding // by relay, then by scenario
}

// Run plays on each relay the scenarios whose names contain only. Those that measure are not played,
// nor those of relays that dial. Tell, if not nil, is told how many of all have been played.
func Run(ctx context.Context, relays []*Relay, only string, tell func(played, all int)) *Table {
	t := &Table{Relays: relays}
	for _, s := range relaytest.Scenarios() {
		if !s.Alone && strings.Contains(s.Name, only) && s.LeftOut(relays[0].bed(), sizes()) == "" {
			t.Scenarios = append(t.Scenarios, s)
		}
	}
	var plays []*Finding
	for _, r := range relays {
		var row []*Finding
		for _, s := range t.Scenarios {
			row = append(row, &Finding{Relay: r, Verdict: relaytest.Verdict{Scenario: s}})
		}
		t.Findings = append(t.Findings, row)
		plays = append(plays, row...)
	}
	var mu sync.Mutex
	played := 0
	const lanes = 12 // most of them wait, most of the time
	next := make(chan *Finding)
	var all sync.WaitGroup
	for range lanes {
		all.Go(func() {
			for f := range next {
				f.play(ctx)
				mu.Lock()
				if played++; tell != nil {
					tell(played, len(plays))
				}
				mu.Unlock()
			}
		})
	}
	for _, f := range plays {
		next <- f
	}
	close(next)
	all.Wait()
	for _, f := range plays {
		if f.Relay.Right && f.Failed() && ctx.Err() == nil {
			f.play(ctx) // alone: a busy machine makes a good relay late
		}
	}
	return t
}

func (f *Finding) play(ctx context.Context) {
	var rec recorder
	o := sizes()
	o.Trace = rec.add
	f.Verdict = relaytest.Check(ctx, f.Relay.bed(), f.Scenario, o)
	f.Events = rec.story()
}

// Failures returns the relay's findings that are failures.
func (t *Table) Failures(r *Relay) (failures []*Finding) {
	for i := range t.Relays {
		if t.Relays[i] != r {
			continue
		}
		for _, f := range t.Findings[i] {
			if f.Failed() {
				failures = append(failures, f)
			}
		}
	}
	return failures
}

// recorder keeps the events of a scenario.
type recorder struct {
	mu     sync.Mutex
	events []relaytest.Event
	last   map[line]int // index of an end's last event
}

type line struct {
	conn   int
	origin bool
}

// mostEvents is what a recorder keeps: no story is longer that somebody wants to read.
const mostEvents = 4000

func (r *recorder) add(e relaytest.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		r.last = make(map[line]int)
	}
	at := line{e.Conn, e.Origin}
	if i, ok := r.last[at]; ok && r.mergeable(i, e) {
		r.events[i].Bytes += e.Bytes
		return
	}
	if len(r.events) < mostEvents {
		r.last[at] = len(r.events)
		r.events = append(r.events, e)
	}
}

// mergeable says whether e only goes on with event i: bytes that follow bytes while nothing else
// happened that matters.
func (r *recorder) mergeable(i int, e relaytest.Event) bool {
	was := r.events[i]
	if was.Kind != e.Kind || e.Bytes == 0 || was.Note != e.Note {
		return false
	}
	for _, between := range r.events[i+1:] {
		if between.Conn == e.Conn && between.Bytes == 0 {
			return false
		}
	}
	return true
}

// story returns the events of the connections that matter: all if they are few, and else of the one
// on which something went wrong.
func (r *recorder) story() []relaytest.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortStableFunc(r.events, func(a, b relaytest.Event) int { return cmp.Compare(a.At, b.At) })
	conns, wrong := 0, 0
	for _, e := range r.events {
		conns = max(conns, e.Conn+1)
		if e.Kind == relaytest.SawNothing || e.Kind == relaytest.SawReset && wrong == 0 {
			wrong = e.Conn
		}
	}
	var story []relaytest.Event
	for _, e := range r.events {
		if e.Kind == relaytest.Opened || conns > 3 && e.Conn != wrong {
			continue
		}
		if conns > 3 {
			e.Conn = 0
		}
		story = append(story, e)
	}
	return story
}
