package relaytest

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
)

func costScenarios() []Scenario {
	return []Scenario{
		{
			Name:    "cpu-half-closed",
			Meaning: "a half-closed connection costs no processor time while it is silent",
			Harm:    "A handful of half-closed connections that wait use up a processor.",
			Level:   Should, Client: HalfClose, Origin: HalfClose, Alone: true, needs: metered,
			play: playCPUHalfClosed,
		},
		{
			Name:    "cpu-stalled",
			Meaning: "a connection whose reader stalls costs no processor time",
			Harm:    "A handful of connections that wait use up a processor.",
			Level:   Should, Alone: true, needs: metered,
			play: playCPUStalled,
		},
		{
			Name:    "mixed-endings",
			Meaning: "connections that end in every way, many at a time, leave nothing behind",
			Harm:    "The relay slowly runs out of descriptors or memory, and then takes no more connections.",
			Alone:   true,
			play:    playMixedEndings,
		},
	}
}

func playCPUHalfClosed(t *trial) error {
	for _, from := range [...]side{fromClient, fromOrigin} {
		if _, _, err := asked(t, from); err != nil {
			return err
		}
	}
	return t.quiet("is half-closed and silent")
}

func playCPUStalled(t *trial) error {
	var floods [2]*flood
	for i, from := range [...]side{fromClient, fromOrigin} {
		near, _, err := t.open(from)
		if err != nil {
			return err
		}
		floods[i] = near.flood(1)
	}
	if err := both(
		func() error { return floods[0].blocked(t.stuck(), still) },
		func() error { return floods[1].blocked(t.stuck(), still) },
	); err != nil {
		return err
	}
	return t.quiet("waits for a reader that stalls")
}

// quiet measures the relay's processor time while nothing happens.
func (t *trial) quiet(while string) error {
	const span, limit = 300 * time.Millisecond, 0.05
	meter, ok := t.bed.(Meter)
	if !ok {
		return errors.ErrUnsupported
	}
	runtime.GC() // not in the middle of it
	var share float64
	for range 3 { // other things may happen in the process, now and then
		before, err := meter.CPU()
		if err != nil {
			return err
		}
		start := time.Now()
		time.Sleep(span)
		after, err := meter.CPU()
		if err != nil {
			return err
		}
		if share = float64(after-before) / float64(time.Since(start)); share < limit {
			t.note("%.1f %% of a processor", 100*share)
			return nil
		}
	}
	return fmt.Errorf("%.0f %% of a processor is used while a connection %s", 100*share, while)
}

func playMixedEndings(t *trial) error {
	return t.settled("connections", func() error { return t.mix(t.Connections) })
}

// settled plays the same a few times. What a relay keeps for later, such as a pool, stops growing;
// what it has lost goes on to grow, by one for each connection that ends in some way.
func (t *trial) settled(what string, play func() error) error {
	const times, slack = 3, 10
	var before, lost held
	for i := range times {
		if err := play(); err != nil {
			return err
		}
		if err := t.over(); err != nil {
			return err
		}
		var now held
		if err := t.settle(&now); errors.Is(err, errors.ErrUnsupported) {
			return nil
		} else if err != nil {
			return err
		}
		lost = held{now.descriptors - before.descriptors, now.goroutines - before.goroutines}
		if i > 0 && lost.descriptors <= slack && lost.goroutines <= slack {
			return nil
		}
		before = now
	}
	return fmt.Errorf("%d %s left %d descriptors and %d goroutines or threads behind, again and again",
		t.Connections, what, lost.descriptors, lost.goroutines)
}

type held struct{ descriptors, goroutines int }

// settle waits until what the relay holds has not changed for a while.
func (t *trial) settle(h *held) error {
	meter, ok := t.bed.(Meter)
	if !ok {
		return errors.ErrUnsupported
	}
	var since time.Time
	for limit := time.Now().Add(t.leaving()); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
		descriptors, goroutines, err := meter.Held()
		if err != nil {
			return err
		}
		if now := (held{descriptors, goroutines}); now != *h {
			*h, since = now, time.Now()
		}
		if time.Since(since) > still/2 {
			break
		}
	}
	return nil
}

// mix makes n connections that end in all ways, and returns when both ends of each are closed.
func (t *trial) mix(n int) error {
	var all sync.WaitGroup
	for i := range n {
		client, origin, err := t.open(side(i % 2))
		if err != nil {
			return err
		}
		all.Go(func() {
			endings[i/2%len(endings)](client, origin)
			client.drop()
			origin.drop()
		})
	}
	all.Wait()
	return nil
}

// endings end a connection between a, who starts it, and b. All must be over when they return. An error
// says that it has not gone as planned, which is the business of other scenarios, as is what the ends
// see of each other's leaving.
var endings = [...]func(a, b *end) error{
	func(a, b *end) error { return nil }, // both close at once
	func(a, b *end) error { // a request and its reply
		return errors.Join(
			both(func() error { return a.send([]byte(request)) }, func() error { return b.expect(request, a.t.leaving()) }),
			both(func() error { return b.send([]byte(verdict)) }, func() error { return a.expect(verdict, a.t.leaving()) }),
		)
	},
	func(a, b *end) error { // as above, by a half-close
		if !a.can(HalfClose) || !b.can(HalfClose) {
			return nil
		}
		return errors.Join(a.closeWrite(), b.expectEnd(a.t.leaving()),
			both(func() error { return b.pour(1, 100<<10) }, func() error { return a.sink(1, 100<<10) }))
	},
	func(a, b *end) error { // reset
		a.leave()
		return nil
	},
	func(a, b *end) error { // reset in the middle of a transfer that is read
		f := a.flood(1)
		err := b.sink(1, 300<<10)
		a.leave()
		return errors.Join(err, f.failed(a.t.leaving()))
	},
	func(a, b *end) error { // a stalled reader, and its writer is reset
		f := a.flood(1)
		f.begun(512 << 10)
		a.leave()
		return f.failed(a.t.leaving())
	},
	func(a, b *end) error { // a stalled reader that closes with bytes unread
		f := a.flood(1)
		f.begun(512 << 10)
		b.Close()
		return f.failed(a.t.leaving())
	},
	func(a, b *end) error { // a half-close, then a reset from the other side
		if a.can(HalfClose) && b.can(HalfClose) {
			if err := errors.Join(a.closeWrite(), b.expectEnd(a.t.leaving())); err != nil {
				return err
			}
		}
		b.leave()
		return nil
	},
	func(a, b *end) error { // both reset
		a.leave()
		b.leave()
		return nil
	},
}
