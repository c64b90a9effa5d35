package relaytest

import (
	"fmt"
	"io"
	"time"
)

const (
	request = "GET /report HTTP/1.0\r\n\r\n"
	verdict = "HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\nno more, please"
)

func halfCloseScenarios() []Scenario {
	const need = HalfClose
	s := either(Scenario{
		Name:    "half-close",
		Meaning: "an end of stream arrives at once, and the reply to it arrives whole and ends cleanly",
		Harm:    "A client that says \"that was all\" and waits for the answer (nc -N, git, rsync) waits for ever, or loses the answer.",
	}, need, need, playHalfClose)
	s = append(s, either(Scenario{
		Name:    "half-close-silence",
		Meaning: "after a half-close both ends may be silent, and the connection stays",
		Harm:    "An answer that takes the origin long to compute is lost.",
	}, need, need, playHalfCloseSilence)...)
	s = append(s, either(Scenario{
		Name:    "half-close-trickle",
		Meaning: "a reply that comes byte by byte after a half-close arrives byte by byte, and whole",
		Harm:    "An answer that comes slowly is cut off in the middle.",
	}, need, need, playHalfCloseTrickle)...)
	s = append(s, either(Scenario{
		Name:    "half-close-stalled",
		Meaning: "a reader that stalls after its half-close gets all of the reply when it goes on",
		Harm:    "A slow reader, such as a paused download, loses the rest of its answer.",
	}, need|Buffered, need|Buffered, playHalfCloseStalled)...)
	return s
}

// asked opens a connection on which near has sent a request and half-closed, and far has seen both.
func asked(t *trial, from side) (near, far *end, err error) {
	if near, far, err = t.open(from); err != nil {
		return nil, nil, err
	}
	err = both(
		func() error {
			if err := near.send([]byte(request)); err != nil {
				return err
			}
			return near.closeWrite()
		},
		func() error {
			if err := far.expect(request, t.Prompt); err != nil {
				return err
			}
			return far.expectEnd(t.Prompt)
		},
	)
	return near, far, err
}

func playHalfClose(t *trial, from side) error {
	near, far, err := asked(t, from)
	if err != nil {
		return err
	}
	const reply = 300 << 10
	return both(
		func() error {
			if err := far.pour(2, reply); err != nil {
				return err
			}
			return far.Close()
		},
		func() error {
			if err := near.sink(2, reply); err != nil {
				return fmt.Errorf("the reply after a half-close: %w", err)
			}
			return near.expectEnd(t.Prompt)
		},
	)
}

func playHalfCloseSilence(t *trial, from side) error {
	near, far, err := asked(t, from)
	if err != nil {
		return err
	}
	return both(
		func() error {
			time.Sleep(t.Silence)
			if err := far.send([]byte(verdict)); err != nil {
				return err
			}
			return far.Close()
		},
		func() error {
			if err := near.expect(verdict, t.Silence+t.Prompt); err != nil {
				return fmt.Errorf("the reply after a half-close and %v of silence: %w", t.Silence, err)
			}
			return near.expectEnd(t.Prompt)
		},
	)
}

func playHalfCloseTrickle(t *trial, from side) error {
	near, far, err := asked(t, from)
	if err != nil {
		return err
	}
	const bytes = 10
	pause := t.Silence * 5 / 4 / bytes
	return both(
		func() error {
			for i := range bytes {
				time.Sleep(pause)
				if err := far.send([]byte{byte('0' + i)}); err != nil {
					return fmt.Errorf("byte %d of the reply: %w", i, err)
				}
			}
			return far.closeWrite()
		},
		func() error {
			for i := range bytes {
				if err := near.expect(string(rune('0'+i)), pause+t.Prompt); err != nil {
					return fmt.Errorf("byte %d of the reply: %w", i, err)
				}
			}
			return near.expectEnd(t.Prompt)
		},
	)
}

func playHalfCloseStalled(t *trial, from side) error {
	near, far, err := asked(t, from)
	if err != nil {
		return err
	}
	f := far.flood(2)
	if err := f.blocked(t.stuck(), still); err != nil {
		return err
	}
	time.Sleep(t.Silence)
	return finish(near, f)
}

// finish lets near read all of a blocked flood and more, then stops it and reads to its clean end.
func finish(near *end, f *flood) error {
	const more = 1 << 20
	var got int64
	if err := both(
		func() error { return f.finish(f.sent.Load() + more) },
		func() (err error) {
			if got, err = near.drain(2, -1); err != io.EOF {
				return near.errorf("got %d bytes after it had stalled, then: %w", got, err)
			}
			return nil
		},
	); err != nil {
		return err
	}
	if sent := f.sent.Load(); got != sent {
		return near.errorf("got %d of %d bytes, and then a clean end", got, sent)
	}
	return nil
}
