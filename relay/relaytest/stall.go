package relaytest

func stallScenarios() []Scenario {
	s := either(Scenario{
		Name:    "backpressure",
		Meaning: "a reader that stalls makes the writer wait after a bounded amount, and then gets everything",
		Harm:    "One slow reader makes the relay use up memory, or loses what it was sent.",
	}, HalfClose, HalfClose, playBackpressure)
	s = append(s, either(Scenario{
		Name:    "stalled-direction",
		Meaning: "while one direction is stuck, the other goes on",
		Harm:    "While an upload is stuck no answer comes down, so that the two wait for each other for ever.",
	}, 0, 0, playStalledDirection)...)
	s = append(s, either(Scenario{
		Name:    "stalled-connection",
		Meaning: "while one connection is stuck, others go on, and new ones open",
		Harm:    "One user with a slow line stops all the others.",
	}, 0, 0, playStalledConnection)...)
	return s
}

func playBackpressure(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	f := near.flood(2)
	if err := f.blocked(t.Held, max(still, t.Prompt)); err != nil {
		return err
	}
	t.note("%d KiB are held for a reader that stalls", f.sent.Load()>>10)
	return finish(far, f)
}

func playStalledDirection(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	return near.flood(1).whileStuck(func() error { return back(t, far, near) })
}

func playStalledConnection(t *trial, from side) error {
	before, beforeFar, err := t.open(from)
	if err != nil {
		return err
	}
	near, _, err := t.open(from)
	if err != nil {
		return err
	}
	return near.flood(1).whileStuck(func() error {
		if err := back(t, before, beforeFar); err != nil {
			return err
		}
		after, afterFar, err := t.open(from)
		if err != nil {
			return err
		}
		return back(t, after, afterFar)
	})
}

// back sends a byte and then more from one end to the other, which must arrive promptly.
func back(t *trial, from, to *end) error {
	if err := both(
		func() error { return from.send([]byte("x")) },
		func() error { return to.expect("x", t.Prompt) },
	); err != nil {
		return err
	}
	const n = 1 << 20
	return both(
		func() error { return from.pour(3, n) },
		func() error { return to.sink(3, n) },
	)
}
