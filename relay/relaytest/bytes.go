package relaytest

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

func byteScenarios() []Scenario {
	s := either(Scenario{
		Name:    "bytes",
		Meaning: "all bytes arrive, in order and unchanged, whatever the sizes of the writes",
		Harm:    "Downloads and uploads arrive damaged, or stop short.",
	}, 0, 0, playBytes)
	s = append(s, Scenario{
		Name:    "bytes/both-ways",
		Meaning: "bytes move both ways at a time",
		Harm:    "Protocols that talk both ways at a time (SSH, HTTP/2, database replication) break or hang.",
		play:    playBothWays,
	})
	s = append(s, either(Scenario{
		Name:    "one-byte-writes",
		Meaning: "a single byte arrives at once and does not wait for more",
		Harm:    "Keys typed in a terminal session appear late, or in lumps.",
	}, 0, 0, playOneByteWrites)...)
	s = append(s, Scenario{
		Name:    "origin-first",
		Meaning: "an origin that speaks first (SMTP, SSH, MySQL) is heard before the client has said a word",
		Harm:    "Mail, SSH and MySQL clients wait for a greeting that the relay holds back, and time out.",
		play:    playOriginFirst,
	})
	s = append(s, either(Scenario{
		Name:    "urgent",
		Meaning: "urgent data does not cut the stream: all bytes before and after it arrive, and the end",
		Harm:    "A transfer that meets one byte of urgent data (telnet's or FTP's interrupt) is cut short, or hangs.",
	}, HalfClose|Urgent, HalfClose|Urgent, playUrgent)...)
	s = append(s, either(Scenario{
		Name:    "write-write-read",
		Meaning: "a request in two writes is not held back for an acknowledgement (Nagle and delayed ACK: 40 ms)",
		Harm:    "Every small request takes 40 ms longer than it need.",
		Level:   Should,
	}, Buffered, Buffered, playWriteWriteRead)...)
	return s
}

func playBytes(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	return both(
		func() error { return near.pour(1, t.Bytes) },
		func() error { return far.sink(1, t.Bytes) },
	)
}

func playBothWays(t *trial) error {
	client, origin, err := t.open(fromClient)
	if err != nil {
		return err
	}
	swap := func(e *end, out, in byte) func() error {
		return func() error {
			return both(
				func() error { return e.pour(out, t.Bytes) },
				func() error { return e.sink(in, t.Bytes) },
			)
		}
	}
	return both(swap(client, 1, 2), swap(origin, 2, 1))
}

func playOneByteWrites(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	const alone, run = 30, 1000
	for i := range alone {
		b := []byte{byte(i)}
		if err := both(
			func() error { return near.send(b) },
			func() error { return far.expect(string(b), t.Prompt) },
		); err != nil {
			return fmt.Errorf("byte %d: %w", i, err)
		}
	}
	want := make([]byte, run)
	newPattern(1).Read(want)
	return both(
		func() error {
			for i := range want {
				if err := near.send(want[i : i+1]); err != nil {
					return err
				}
			}
			return nil
		},
		func() error { return far.expect(string(want), t.Timeout) },
	)
}

func playOriginFirst(t *trial) error {
	client, origin, err := t.open(fromClient)
	if err != nil {
		return err
	}
	const greeting, hello = "220 origin ready\r\n", "EHLO client\r\n"
	if err := both(
		func() error { return origin.send([]byte(greeting)) },
		func() error { return client.expect(greeting, t.Prompt) },
	); err != nil {
		return err
	}
	return both(
		func() error { return client.send([]byte(hello)) },
		func() error { return origin.expect(hello, t.Prompt) },
	)
}

// playUrgent sends bulk, an urgent byte, and bulk again. The urgent byte may arrive or not: a reader
// that does not ask for it in line never sees it on a direct connection.
func playUrgent(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	const bulk = 512 << 10
	return both(
		func() error {
			if err := near.pour(1, bulk); err != nil {
				return err
			}
			if err := sendUrgent(near.sock, []byte("!")); err != nil {
				return near.errorf("could not send an urgent byte: %w", err)
			}
			near.event(Sent, 1, "urgent")
			time.Sleep(20 * time.Millisecond) // so that the mark is met by a relay that waits for more
			if err := near.pour(2, bulk); err != nil {
				return err
			}
			return near.closeWrite()
		},
		func() error {
			if err := far.sink(1, bulk); err != nil {
				return fmt.Errorf("before the urgent byte: %w", err)
			}
			rest := make([]byte, bulk+2)
			far.SetReadDeadline(time.Now().Add(t.Timeout / 2))
			n := 0
			var err error
			for n < len(rest) && err == nil {
				var m int
				m, err = far.Read(rest[n:])
				n += m
			}
			want := make([]byte, bulk)
			newPattern(2).Read(want)
			switch got := rest[:n]; {
			case slices.Equal(got, want):
				return nil
			case n > 0 && got[0] == '!' && slices.Equal(got[1:], want):
				t.note("the urgent byte arrives in line")
				return nil
			}
			if n < bulk {
				return far.errorf("got %d of %d bytes after the urgent byte, then: %w", n, bulk, err)
			}
			return far.errorf("got wrong bytes after the urgent byte")
		},
	)
}

// control is a direct connection to compare with.
type control struct {
	near, far net.Conn
	echoing   sync.WaitGroup
}

func newControl(ctx context.Context) (*control, error) {
	near, far, err := TCP().Pair(ctx)
	if err != nil {
		return nil, err
	}
	deadline, ok := ctx.Deadline()
	if ok {
		near.SetDeadline(deadline)
		far.SetDeadline(deadline)
	}
	return &control{near: near, far: far}, nil
}

func (c *control) close() {
	c.near.Close()
	c.far.Close()
	c.echoing.Wait()
}

// ask makes a request in two writes and returns how long the answer took.
func (c *control) ask(header, body, reply string) (time.Duration, error) {
	c.echoing.Go(func() {
		if _, err := io.ReadFull(c.far, make([]byte, len(header)+len(body))); err == nil {
			io.WriteString(c.far, reply)
		}
	})
	start := time.Now()
	io.WriteString(c.near, header)
	time.Sleep(time.Millisecond)
	io.WriteString(c.near, body)
	_, err := io.ReadFull(c.near, make([]byte, len(reply)))
	return time.Since(start), err
}

func playWriteWriteRead(t *trial, from side) error {
	near, far, err := t.open(from)
	if err != nil {
		return err
	}
	const rounds = 30
	const header, body, reply = "HEADER", "BODY", "REPLY"
	var took, direct []time.Duration
	control, err := newControl(t.ctx)
	if err != nil {
		return err
	}
	defer control.close()
	play := func() error {
		for range rounds {
			d, err := control.ask(header, body, reply)
			if err != nil {
				return err
			}
			direct = append(direct, d)
			start := time.Now()
			if err := near.send([]byte(header)); err != nil {
				return err
			}
			time.Sleep(time.Millisecond) // so that the relay reads the two apart
			if err := near.send([]byte(body)); err != nil {
				return err
			}
			if err := near.expect(reply, t.Prompt); err != nil {
				return err
			}
			took = append(took, time.Since(start))
		}
		return nil
	}
	answer := func() error {
		for range rounds {
			if err := far.expect(header+body, 2*t.Prompt); err != nil {
				return err
			}
			if err := far.send([]byte(reply)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := both(play, answer); err != nil {
		return err
	}
	// A held-back segment costs every round 40 ms. A loaded machine may cost as much, but it shows on a direct
	// connection, too.
	slices.Sort(took)
	slices.Sort(direct)
	quarter, base := took[len(took)/4], direct[len(direct)/4]
	t.note("a quarter of the round trips took %v at most, and %v directly",
		quarter.Round(time.Microsecond), base.Round(time.Microsecond))
	if quarter > t.Delay+2*base {
		return fmt.Errorf("three of four requests in two writes took more than %v for the answer",
			quarter.Round(time.Millisecond))
	}
	return nil
}
