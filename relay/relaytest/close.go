package relaytest

import (
	"errors"
	"fmt"
	"io"
)

func closeScenarios() []Scenario {
	s := either(Scenario{
		Name:    "send-and-close",
		Meaning: "what an end sends before it closes at once arrives whole, and ends cleanly, every time",
		Harm:    "Now and then a short message or the last part of a file is lost, and nobody is told.",
	}, 0, HalfClose, playSendAndClose)
	s = append(s, Scenario{
		Name:    "simultaneous-close",
		Meaning: "when both ends send and half-close at a time, both get all, and a clean end",
		Harm:    "When both sides finish at the same moment, one of them loses what the other said last.",
		Client:  HalfClose,
		Origin:  HalfClose,
		play:    playSimultaneousClose,
	})
	s = append(s, either(Scenario{
		Name:    "early-response",
		Meaning: "a reply and an end arrive while the upload goes on, and the upload is not cut by it",
		Harm:    "An origin that answers before the upload is over has the upload cut off, or its answer lost.",
	}, HalfClose, HalfClose, playEarlyResponse)...)
	s = append(s, either(Scenario{
		Name:    "early-response-close",
		Meaning: "the reply of an end that closes in the middle of an upload arrives, and the upload fails",
		Harm:    "A server's \"413 too large\" is lost: the uploader sees an error without a reason, or uploads to nobody.",
	}, 0, 0, playEarlyResponseClose)...)
	s = append(s, either(Scenario{
		Name:    "early-response-unread",
		Meaning: "the same for an uploader that reads only once its upload has failed",
		Harm:    "The error message of a server that has hung up is thrown away before the uploader reads it.",
	}, Buffered, Buffered, playEarlyResponseUnread)...)
	s = append(s, either(Scenario{
		Name:    "write-after-close",
		Meaning: "an end that writes to one that has closed is told that nobody reads it",
		Harm:    "A program goes on for ever sending to one that has gone: its work is lost and it is never told.",
	}, HalfClose, 0, playWriteAfterClose)...)
	return s
}

// rounds plays f n times, a few at a time.
func rounds(n int, f func() error) error {
	const lanes = 4
	errs := make(chan error, lanes)
	for lane := range lanes {
		go func() {
			for i := lane; i < n; i += lanes {
				if err := f(); err != nil {
					errs <- fmt.Errorf("round %d of %d: %w", i+1, n, err)
					return
				}
			}
			errs <- nil
		}()
	}
	var all []error
	for range lanes {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

func playSendAndClose(t *trial, from side) error {
	return rounds(t.Rounds, func() error {
		near, far, err := t.open(from)
		if err != nil {
			return err
		}
		const n = 40 << 10
		if err := both(
			func() error {
				if err := near.pour(1, n); err != nil {
					return err
				}
				return near.Close()
			},
			func() error {
				if err := far.sink(1, n); err != nil {
					return err
				}
				return far.expectEnd(t.Prompt)
			},
		); err != nil {
			return err
		}
		return far.Close()
	})
}

func playSimultaneousClose(t *trial) error {
	return rounds(t.Rounds/4, func() error {
		client, origin, err := t.open(fromClient)
		if err != nil {
			return err
		}
		const n = 100 << 10
		swap := func(e *end, out, in byte) func() error {
			return func() error {
				err := both(
					func() error {
						if err := e.pour(out, n); err != nil {
							return err
						}
						return e.closeWrite()
					},
					func() error {
						if err := e.sink(in, n); err != nil {
							return err
						}
						return e.expectEnd(t.Prompt)
					},
				)
				e.Close()
				return err
			}
		}
		return both(swap(client, 1, 2), swap(origin, 2, 1))
	})
}

func playEarlyResponse(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	up := near.flood(1)
	if _, err := far.drain(1, 100<<10); err != nil {
		return far.errorf("reading the upload: %w", err)
	}
	if err := far.send([]byte(verdict)); err != nil {
		return err
	}
	if err := far.closeWrite(); err != nil {
		return err
	}
	if err := near.expect(verdict, t.Prompt); err != nil {
		return err
	}
	if err := near.expectEnd(t.Prompt); err != nil {
		return err
	}
	// The upload goes on: the pattern continues where drain has stopped, so only its end is read.
	return both(
		func() error { return up.finish(up.sent.Load() + 4<<20) },
		func() error {
			n, err := io.Copy(io.Discard, struct{ io.Reader }{far})
			if err != nil {
				return far.errorf("got %d bytes of the upload after its reply, then: %w", n, err)
			}
			if n < 4<<20 {
				return far.errorf("got only %d bytes of the upload after its reply", n)
			}
			return nil
		},
	)
}

// The next two lose what they lose in a race, so that they are played a few times.
func playEarlyResponseClose(t *trial, from side) error {
	return rounds(max(4, t.Rounds/5), func() error { return earlyResponseClose(t, from) })
}

func earlyResponseClose(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	up := near.flood(1)
	if _, err := far.drain(1, 100<<10); err != nil {
		return far.errorf("reading the upload: %w", err)
	}
	if err := both(
		func() error {
			if err := far.send([]byte(verdict)); err != nil {
				return err
			}
			return far.Close()
		},
		func() error { return near.expect(verdict, t.Prompt) },
	); err != nil {
		return err
	}
	return up.failed(2 * t.Prompt)
}

func playEarlyResponseUnread(t *trial, from side) error {
	return rounds(max(4, t.Rounds/5), func() error { return earlyResponseUnread(t, from) })
}

func earlyResponseUnread(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	up := near.flood(1)
	if _, err := far.drain(1, 100<<10); err != nil {
		return far.errorf("reading the upload: %w", err)
	}
	if err := far.send([]byte(verdict)); err != nil {
		return err
	}
	far.Close()
	if err := up.failed(2 * t.Prompt); err != nil {
		return err
	}
	if err := near.expect(verdict, t.Prompt); err != nil {
		return fmt.Errorf("after the upload had failed: %w", err)
	}
	return nil
}

func playWriteAfterClose(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	if err := both(
		func() error { return near.send([]byte(request)) },
		func() error {
			if err := far.expect(request, t.Prompt); err != nil {
				return err
			}
			return far.Close()
		},
	); err != nil {
		return err
	}
	if err := near.expectEnd(t.Prompt); err != nil {
		return err
	}
	return near.expectWritesFail(2 * t.Prompt)
}
