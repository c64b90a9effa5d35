package relaytest

import (
	"fmt"
	"io"
	"time"
)

func resetScenarios() []Scenario {
	s := either(Scenario{
		Name:    "reset-idle",
		Meaning: "a reset of an idle connection arrives as a reset, at once",
		Harm:    "A connection that was broken off looks as if it had ended well, or lingers for hours.",
	}, Reset, 0, playResetIdle)
	s = append(s, either(Scenario{
		Name:    "reset-sending",
		Meaning: "a transfer that its sender aborts does not look complete",
		Harm:    "A download that was broken off in the middle looks complete: a damaged file is taken for a good one.",
	}, Reset, 0, playResetSending)...)
	s = append(s, either(Scenario{
		Name:    "reset-receiving",
		Meaning: "when a reader aborts a transfer, its sender is told so",
		Harm:    "A server goes on for ever sending to a user who has pressed stop.",
	}, Reset, 0, playResetReceiving)...)
	s = append(s, either(Scenario{
		Name:    "reset-behind-data",
		Meaning: "a reset arrives although the relay is stuck with data for an end that does not read",
		Harm:    "A connection whose owner has gone is held for hours, with all that waits in it.",
	}, Reset|Watch, Watch|Buffered, playResetBehindData)...)
	s = append(s, either(Scenario{
		Name:    "reset-after-half-close",
		Meaning: "a reset by an end that has half-closed arrives, although nobody reads or writes",
		Harm:    "A client that has asked and then given up keeps the origin at work, and a connection on the relay.",
	}, HalfClose|Reset|Watch, HalfClose|Watch, playResetAfterHalfClose)...)
	s = append(s, either(Scenario{
		Name:    "reset-in-reply",
		Meaning: "a reply that is aborted after the request's half-close does not look complete",
		Harm:    "An answer that was broken off in the middle looks complete.",
	}, HalfClose|Reset, HalfClose, playResetInReply)...)
	s = append(s, either(Scenario{
		Name:    "reset-after-reply",
		Meaning: "a reset after a whole request and reply arrives as a reset",
		Harm:    "A connection pool keeps a connection that the other side has thrown away.",
	}, Reset, 0, playResetAfterReply)...)
	s = append(s, either(Scenario{
		Name:    "data-before-reset",
		Meaning: "what was delivered before a reset is delivered, and then the reset",
		Harm:    "The last words before a crash, such as an error message, are lost.",
	}, Reset|Buffered, Buffered, playDataBeforeReset)...)
	return s
}

// talked opens a connection on which each end has heard the other.
func talked(t *trial, from side) (near, far *end, err error) {
	if near, far, err = t.open(from); err != nil {
		return nil, nil, err
	}
	say := func(from, to *end, what string) error {
		return both(
			func() error { return from.send([]byte(what)) },
			func() error { return to.expect(what, t.Prompt) },
		)
	}
	if err := say(near, far, "ping"); err != nil {
		return nil, nil, err
	}
	return near, far, say(far, near, "pong")
}

func playResetIdle(t *trial, from side) error {
	near, far, err := talked(t, from)
	if err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	return far.expectBroken(t.Prompt)
}

func playResetSending(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	near.flood(1)
	if err := far.sink(1, 1<<20); err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	return far.expectBroken(2 * t.Prompt)
}

func playResetReceiving(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	f := far.flood(1)
	if err := near.sink(1, 1<<20); err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	return f.failed(2 * t.Prompt)
}

func playResetBehindData(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	if err := near.flood(1).blocked(t.stuck(), still); err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	// A relay may well give what is stuck a moment to move, and a chain has several relays.
	if err := far.awaitBroken(max(2*t.Prompt, 1500*time.Millisecond)); err != nil {
		return err
	}
	n, err := far.drain(1, -1)
	if err == io.EOF && far.can(Reset) {
		return far.errorf("read %d bytes of an aborted transfer, and then a clean end", n)
	}
	return nil
}

func playResetAfterHalfClose(t *trial, from side) error {
	near, far, err := asked(t, from)
	if err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	if err := far.awaitBroken(2 * t.Prompt); err != nil {
		return err
	}
	return far.expectWritesFail(t.Prompt)
}

func playResetInReply(t *trial, from side) error {
	// It is the one who replies that resets, so that the one who asks is at the other side.
	asker, near, err := asked(t, from^1)
	if err != nil {
		return err
	}
	const part = 20 << 10
	if err := near.pour(2, part); err != nil {
		return err
	}
	if err := asker.sink(2, part); err != nil {
		return fmt.Errorf("the reply after a half-close: %w", err)
	}
	if err := near.reset(); err != nil {
		return err
	}
	return asker.expectBroken(t.Prompt)
}

func playResetAfterReply(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	const reply = 200 << 10
	if err := both(
		func() error {
			if err := near.expect(request, t.Prompt); err != nil {
				return err
			}
			return near.pour(2, reply)
		},
		func() error {
			if err := far.send([]byte(request)); err != nil {
				return err
			}
			return far.sink(2, reply)
		},
	); err != nil {
		return err
	}
	if err := near.reset(); err != nil {
		return err
	}
	return far.expectBroken(t.Prompt)
}

func playDataBeforeReset(t *trial, from side) error {
	return rounds(t.Rounds/10, func() error {
		// A reset that comes before connect has returned makes connect fail, without a relay as well.
		near, far, err := talked(t, from)
		if err != nil {
			return err
		}
		const n = 40 << 10
		if err := near.pour(1, n); err != nil {
			return err
		}
		if err := near.taken(); err != nil {
			return err
		}
		if err := near.reset(); err != nil {
			return err
		}
		if far.can(Watch) {
			if err := far.awaitBroken(2 * t.Prompt); err != nil {
				return err
			}
		}
		if err := far.sink(1, n); err != nil {
			return err
		}
		return far.expectBroken(2 * t.Prompt)
	})
}
