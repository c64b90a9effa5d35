// Package relaytest holds the scenarios that a relay of byte streams must pass: a port forwarder, a
// proxy, a tunnel, or just the function in the middle of one.
//
// One sentence is behind all of them: neither end can tell the relay from a direct connection. So a
// scenario never touches the relay. It plays the client and the origin, sends, half-closes, stalls
// and resets as real programs do, and looks at what arrives on the other side. With no relay in
// between at all, every scenario passes; what fails behind a relay is the relay's doing.
//
// # Testing a function
//
// Give [Run] the function that joins two conns, owns them and returns when both are done with:
//
//	func TestRelay(t *testing.T) {
//		relaytest.Run(t, func(ctx context.Context, client, origin net.Conn) {
//			myrelay.Join(client, origin)
//		})
//	}
//
// [RunOver] does the same over other transports than TCP, each a [Leg], and any mix of two.
//
// # Testing a program
//
// A [Bed] is where scenarios get their connections from. [Dialed] is the bed of a relay that runs
// somewhere: it listens as the origin and connects to the relay, with a handshake of yours if the
// relay wants one. There are scenarios for it alone: what a relay does while it dials, and with an
// origin that refuses or does not answer. [RunBed] runs all scenarios on a bed; [CheckAll] does so
// without package testing, and [Check] plays one.
//
// # Reading a failure
//
// A scenario has a name, a meaning (what a relay that passes does, in one line) and a level: [Must]
// where bytes, an end or an error are lost or something hangs or leaks, [Should] where it is
// only slow, or where no protocol promises it. Most come in two forms, from-client and from-origin,
// by who does what the name says. [Scenario.Harm] says what a user of a relay that fails suffers.
//
// [Options.Trace] gets every event of the ends as it happens: who sent what, and who saw what.
package relaytest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// Caps says what a leg's transport can carry from one end to the other.
type Caps uint

// What a leg can do.
const (
	HalfClose Caps = 1 << iota // an end can say that it sends no more, and still read
	Reset                      // an end can break off so that the other cannot take it for an end
	Watch                      // a broken connection is noticed by an end that does not read
	Buffered                   // bytes are taken before the other end reads them
	Urgent                     // TCP urgent data
	Vanish                     // an end can vanish without a word, as a machine that loses its power (root only)
)

// String returns the names of the capabilities, joined by "+".
func (c Caps) String() string {
	var names []string
	for i, name := range [...]string{"half-close", "reset", "watch", "buffered", "urgent", "vanish"} {
		if c&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "+")
}

// Level says how bad it is to fail a scenario.
type Level uint8

// The levels.
const (
	Must   Level = iota // bytes, ends or errors are lost, or something hangs or leaks
	Should              // it is slower or dearer than it need be, or fails those who run ahead of a protocol
)

// String returns "must" or "should".
func (l Level) String() string { return [...]string{"must", "should"}[min(l, Should)] }

// Options are the sizes and times of scenarios. The zero value suits a unit test.
type Options struct {
	// Bytes is how much the bulk scenarios move each way. Zero is 4 MiB.
	Bytes int64
	// Rounds is how often the scenarios that look for a race repeat. Zero is 200.
	Rounds int
	// Silence is how long the scenarios about silent and stalled ends keep at it; trickles take a
	// quarter more. Zero is 400 ms, which finds no relay whose limits are seconds; 12 s finds those.
	Silence time.Duration
	// Connections is how many connections end in all ways, twice at least, before it is counted
	// what they have left behind. Zero is 100.
	Connections int
	// Prompt is how soon a thing must arrive that needs no waiting for. Zero is 1 s, which leaves a
	// loaded machine room; 250 ms is what a user does not notice.
	Prompt time.Duration
	// Delay is how much longer than on a direct connection a small request and its reply may take.
	// Zero is 30 ms, which finds what Nagle's algorithm and a delayed acknowledgement cost; more is for
	// long chains on machines that have other things to do.
	Delay time.Duration
	// Held is how many bytes relay and kernels together may hold for a reader that stalls before
	// the writer blocks. Zero is 48 MiB: with Linux's limits, a relay that holds no more than a
	// pipe of bytes itself lets the kernels hold 40 MiB in the worst case.
	Held int64
	// Only leaves out, where all scenarios are played, those whose names do not contain it.
	Only string
	// Timeout ends a scenario that hangs. Zero is 15 s and Silence.
	Timeout time.Duration
	// Trace is told what the ends do and see, as it happens. It is called by several goroutines at
	// a time, and holds up the end that calls it. Nil tells nobody.
	Trace func(Event)
}

// Full returns the sizes that find what limits of seconds and rare races do: what `sluice conform`
// uses. A good relay takes about 40 s for them.
func Full() Options {
	return Options{
		Bytes: 64 << 20, Rounds: 200, Connections: 250, Silence: 12 * time.Second, Prompt: 250 * time.Millisecond,
		Held: 128 << 20, // a chain of relays has the buffers of several kernel sockets
	}
}

func (o Options) fill() Options {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if o.Bytes == 0 {
		o.Bytes = 4 << 20
	}
	if o.Rounds == 0 {
		o.Rounds = 200
	}
	if o.Connections == 0 {
		o.Connections = 100
	}
	if o.Held == 0 {
		o.Held = 48 << 20
	}
	set(&o.Silence, 400*time.Millisecond)
	set(&o.Prompt, time.Second)
	set(&o.Delay, 30*time.Millisecond)
	set(&o.Timeout, 15*time.Second+o.Silence)
	return o
}

// Scenario is one thing that a relay must do. [Scenarios] makes them, [Check] plays them.
type Scenario struct {
	Name    string // such as "half-close/from-client"
	Meaning string // what a relay that passes does, in one line
	Harm    string // what the users of a relay that fails suffer, as a sentence
	Level   Level
	Client  Caps // what the client's leg must carry
	Origin  Caps // what the origin's leg must carry
	Alone   bool // it measures the process or the relay, so that nothing else may run beside it

	needs func(Bed, Options) string // says why it cannot be played; nil: it can
	play  func(*trial) error
}

// LeftOut says why the scenario cannot be played on the bed with these options, or returns "".
func (s Scenario) LeftOut(b Bed, o Options) string {
	client, origin := b.Caps()
	if lack := s.Client &^ client; lack != 0 {
		return fmt.Sprintf("the client's leg has no %v", lack)
	}
	if lack := s.Origin &^ origin; lack != 0 {
		return fmt.Sprintf("the origin's leg has no %v", lack)
	}
	if s.needs != nil {
		return s.needs(b, o.fill())
	}
	return ""
}

// metered needs a bed that measures the relay.
func metered(b Bed, _ Options) string {
	m, ok := b.(Meter)
	if !ok {
		return "the relay is not measured"
	}
	switch _, err := m.CPU(); {
	case errors.Is(err, errors.ErrUnsupported):
		return "the relay is not measured"
	case err != nil:
		return "the relay cannot be measured: " + err.Error()
	}
	return ""
}

// Verdict is what became of one scenario.
type Verdict struct {
	Scenario Scenario
	LeftOut  string   // why it was not played, empty if it was
	Err      error    // what went wrong, nil if the relay passed or the scenario was left out
	Notes    []string // what was measured
	Took     time.Duration
}

// Reason returns what went wrong, on one line and without the addresses of conns; empty if nothing did.
func (v Verdict) Reason() string {
	if v.Err == nil {
		return ""
	}
	var words []string
	all := strings.Fields(strings.ReplaceAll(v.Err.Error(), "\n", "; "))
	for i := 0; i < len(all); i++ {
		if i+2 < len(all) && (all[i] == "read" || all[i] == "write") && strings.HasPrefix(all[i+1], "tcp") {
			i += 2 // as in "read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer"
			continue
		}
		words = append(words, all[i])
	}
	return strings.NewReplacer("read: ", "", "write: ", "").Replace(strings.Join(words, " "))
}

// Check plays s on b and says what became of it. It returns within the timeout of the options and
// little more, and closes every connection that it opened.
func Check(ctx context.Context, b Bed, s Scenario, o Options) Verdict {
	o = o.fill()
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	t := &trial{Options: o, ctx: ctx, bed: b, start: start}
	unblock := context.AfterFunc(ctx, t.close)
	err := s.play(t)
	if ctx.Err() != nil {
		err = errors.Join(fmt.Errorf("gave up after %v", time.Since(start).Round(time.Millisecond)), err)
	}
	unblock()
	t.close()
	t.background.Wait()
	if err == nil {
		err = t.over()
	}
	return Verdict{Scenario: s, Err: err, Notes: t.notes, Took: time.Since(start)}
}

// trial is one play of one scenario on one bed.
type trial struct {
	Options
	ctx        context.Context
	bed        Bed
	start      time.Time
	background sync.WaitGroup // writers that run until their conn is closed

	mu     sync.Mutex
	pairs  []*Pair
	ends   []*end
	closed bool
	notes  []string
}

// leaving is how long a relay may take to be done with a connection whose ends are both gone.
func (t *trial) leaving() time.Duration { return t.Timeout / 3 }

// open opens a connection and returns the end that acts and the one at the other side.
func (t *trial) open(from side) (near, far *end, err error) {
	p, err := t.bed.Open(t.ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("opening a connection: %w", err)
	}
	if near, far, err = t.take(p); err != nil {
		return nil, nil, err
	}
	if from == fromOrigin {
		near, far = far, near
	}
	return near, far, nil
}

// take makes the two ends of a connection that has been opened.
func (t *trial) take(p *Pair) (client, origin *end, err error) {
	clientCaps, originCaps := t.bed.Caps()
	t.mu.Lock()
	number := len(t.pairs)
	t.pairs = append(t.pairs, p)
	t.mu.Unlock()
	if client, err = t.newEnd(p.Client, "client", number, clientCaps); err != nil {
		p.Origin.Close()
		return nil, nil, err
	}
	if origin, err = t.newEnd(p.Origin, "origin", number, originCaps); err != nil {
		return nil, nil, err
	}
	return client, origin, nil
}

// newEnd makes an end that is dropped at the end of the trial.
func (t *trial) newEnd(c net.Conn, name string, number int, caps Caps) (*end, error) {
	e := newEnd(t, name, c, caps)
	e.number = number
	t.mu.Lock()
	t.ends = append(t.ends, e)
	closed := t.closed
	t.mu.Unlock()
	if closed {
		e.drop()
		return nil, t.ctx.Err()
	}
	e.event(Opened, 0, "")
	return e, nil
}

func (t *trial) close() {
	t.mu.Lock()
	t.closed = true
	ends := t.ends
	t.mu.Unlock()
	for _, e := range ends {
		e.drop()
	}
}

// over waits until the relay has ended every connection of the trial, all of whose ends are closed.
func (t *trial) over() error {
	limit := time.After(t.leaving())
	t.mu.Lock()
	pairs := t.pairs
	t.mu.Unlock()
	for i, p := range pairs {
		if p.Done == nil {
			continue
		}
		select {
		case <-p.Done:
		case <-limit:
			return fmt.Errorf("the relay still holds connection %d of %d, %v after both its ends have closed",
				i+1, len(pairs), t.leaving())
		}
	}
	return nil
}

func (t *trial) note(format string, args ...any) {
	t.mu.Lock()
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
	t.mu.Unlock()
}

// both runs f and g at a time and returns the first's error, or else the second's.
func both(f, g func() error) error {
	other := make(chan error, 1)
	go func() { other <- g() }()
	err := f()
	return errors.Join(err, <-other)
}

// side says which end does what a scenario is named for.
type side uint8

const (
	fromClient side = iota
	fromOrigin
)

func (s side) String() string { return [...]string{"from-client", "from-origin"}[s] }

// either makes the two forms of a scenario in which one end, near, acts and the other, far, sees it.
func either(s Scenario, near, far Caps, play func(t *trial, from side) error) []Scenario {
	up, down := s, s
	up.Name, down.Name = s.Name+"/from-client", s.Name+"/from-origin"
	up.Client, up.Origin = near, far
	down.Client, down.Origin = far, near
	up.play = func(t *trial) error { return play(t, fromClient) }
	down.play = func(t *trial) error { return play(t, fromOrigin) }
	return []Scenario{up, down}
}

// Scenarios returns all scenarios, in the order in which they are best read.
func Scenarios() []Scenario {
	var all []Scenario
	all = append(all, byteScenarios()...)
	all = append(all, halfCloseScenarios()...)
	all = append(all, closeScenarios()...)
	all = append(all, stallScenarios()...)
	all = append(all, resetScenarios()...)
	all = append(all, vanishScenarios()...)
	all = append(all, dialScenarios()...)
	all = append(all, costScenarios()...)
	return all
}
