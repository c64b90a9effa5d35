package relaytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// The scenarios of a relay that dials: they need a [Dialed] bed.
func dialScenarios() []Scenario {
	return []Scenario{
		{
			Name:    "handshake-bytewise",
			Meaning: "a handshake that comes byte by byte is understood",
			Harm:    "Clients on a slow or lossy line, or with a simple library, cannot use the proxy now and then.",
			needs:   handshakes,
			play:    playHandshakeBytewise,
		},
		{
			Name:    "early-data",
			Meaning: "what a client sends with its handshake, before it has its answer, arrives",
			Harm:    "A client that saves a round trip by sending its request with the handshake loses the request, and hangs.",
			Level:   Should,
			needs:   handshakes,
			play:    playEarlyData,
		},
		{
			Name:    "ipv6",
			Meaning: "an origin with an IPv6 address is reached",
			Harm:    "Sites that have IPv6 only cannot be reached.",
			needs:   handshakesIPv6,
			play:    playIPv6,
		},
		{
			Name:    "origin-refused",
			Meaning: "a client whose origin refuses is told so, by a no or a reset, and not by a clean end",
			Harm:    "A service that is down looks as if it had answered with nothing, or the client waits and waits.",
			Alone:   true,
			needs:   dials,
			play:    playOriginRefused,
		},
		{
			Name:    "origin-silent",
			Meaning: "a client whose origin does not answer is not told yes, nor that all has ended well",
			Harm:    "A service that is cut off looks up: clients, health checks and retries are misled.",
			Alone:   true,
			needs:   dials,
			play:    playOriginSilent,
		},
		{
			Name:    "origin-late",
			Meaning: "what a client sends while its origin is slow to answer is kept, its end too, and arrives",
			Harm:    "When the origin is slow to take connections, requests are lost instead of late.",
			Alone:   true,
			needs:   dials,
			play:    playOriginLate,
		},
		{
			Name:    "dial-abandoned",
			Meaning: "a client that gives up while the origin is being dialled ends the dial",
			Harm:    "Users who give up leave connections at an origin that is overloaded already.",
			Level:   Should,
			Alone:   true,
			needs:   dials,
			play:    playDialAbandoned,
		},
		{
			Name:    "port-scan",
			Meaning: "clients that connect and leave at once, cleanly or not, leave nothing behind",
			Harm:    "A port scan or a health check every second makes the relay run out of descriptors.",
			Alone:   true,
			needs:   dials,
			play:    playPortScan,
		},
	}
}

func dials(b Bed, _ Options) string {
	d, ok := b.(*Dialed)
	if !ok {
		return "the relay does not dial"
	}
	if _, ok := d.Origin.(*net.TCPListener); !ok {
		return "the origin does not listen on TCP"
	}
	return absences()
}

func handshakes(b Bed, _ Options) string {
	if d, ok := b.(*Dialed); !ok || d.Handshake == nil {
		return "the relay has no handshake"
	}
	return ""
}

func handshakesIPv6(b Bed, o Options) string {
	if why := handshakes(b, o); why != "" {
		return why
	}
	ln, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		return "this machine has no IPv6: " + err.Error()
	}
	ln.Close()
	return ""
}

// openBy opens a connection to an origin of its own, with a handshake of its own.
func (t *trial) openBy(listen string, way func(net.Conn) io.ReadWriter) (client, origin *end, err error) {
	b := t.bed.(*Dialed)
	if listen == "" {
		of, _, err := net.SplitHostPort(b.Origin.Addr().String())
		if err != nil {
			return nil, nil, err
		}
		listen = net.JoinHostPort(of, "0")
	}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	p, err := b.open(t.ctx, ln, way)
	if err != nil {
		return nil, nil, err
	}
	return t.take(p)
}

// talk lets the client ask and the origin answer.
func talk(t *trial, client, origin *end) error {
	return errors.Join(
		both(func() error { return client.send([]byte(request)) }, func() error { return origin.expect(request, 2*t.Prompt) }),
		both(func() error { return origin.send([]byte(verdict)) }, func() error { return client.expect(verdict, 2*t.Prompt) }),
	)
}

func playHandshakeBytewise(t *trial) error {
	client, origin, err := t.openBy("", func(c net.Conn) io.ReadWriter { return bytewise{c} })
	if err != nil {
		return err
	}
	return talk(t, client, origin)
}

// bytewise writes each byte by itself, and gives it the time to be read by itself.
type bytewise struct{ net.Conn }

func (b bytewise) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := b.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
		time.Sleep(2 * time.Millisecond)
	}
	return len(p), nil
}

func playEarlyData(t *trial) error {
	// A first handshake tells how many messages the client sends; the data goes with the last.
	count := &early{}
	if _, _, err := t.openBy("", func(c net.Conn) io.ReadWriter { count.Conn = c; return count }); err != nil {
		return err
	}
	client, origin, err := t.openBy("", func(c net.Conn) io.ReadWriter {
		return &early{Conn: c, at: count.writes, data: request}
	})
	if err != nil {
		return fmt.Errorf("data behind the handshake: %w", err)
	}
	client.event(Sent, len(request), "with the handshake")
	if err := origin.expect(request, 2*t.Prompt); err != nil {
		return fmt.Errorf("data behind the handshake: %w", err)
	}
	return talk(t, client, origin)
}

// early sends data with the write that is number at.
type early struct {
	net.Conn
	at, writes int
	data       string
}

func (e *early) Write(p []byte) (int, error) {
	if e.writes++; e.writes != e.at {
		return e.Conn.Write(p)
	}
	n, err := e.Conn.Write(append(append([]byte(nil), p...), e.data...))
	return min(n, len(p)), err
}

func playIPv6(t *trial) error {
	client, origin, err := t.openBy("[::1]:0", plainly)
	if err != nil {
		return err
	}
	return talk(t, client, origin)
}

// call is a client that dials through the relay.
type call struct {
	b      *Dialed
	cancel context.CancelFunc
	done   chan struct{}
	conn   net.Conn // after done
	err    error
	raw    chan net.Conn // gets the connection to the relay as soon as there is one
}

// call starts to dial. Whoever calls takes the conn, or gives it up by abandon.
func (t *trial) call(b *Dialed, origin net.Addr) *call {
	ctx, cancel := context.WithCancel(t.ctx)
	c := &call{b: b, cancel: cancel, done: make(chan struct{}), raw: make(chan net.Conn, 1)}
	go c.run(ctx, origin)
	return c
}

func (c *call) run(ctx context.Context, origin net.Addr) {
	defer close(c.done)
	watched := Dialed{Handshake: c.b.Handshake, Connect: func(ctx context.Context) (net.Conn, error) {
		conn, err := c.b.Connect(ctx)
		if err == nil {
			c.raw <- conn
		}
		return conn, err
	}}
	c.conn, c.err = watched.dial(ctx, origin, plainly)
}

// told says whether the relay has answered, and is false after the time given if not.
func (c *call) told(within time.Duration) bool {
	select {
	case <-c.done:
		return true
	case <-time.After(within):
		return false
	}
}

// abandon resets the client's connection, however far it has come.
func (c *call) abandon() {
	select {
	case conn := <-c.raw:
		breakOff(conn)
	default:
	}
	c.cancel()
	<-c.done
	if c.conn != nil {
		c.conn.Close()
	}
}

// absently plays with an origin that is not there.
func absently(t *trial, play func(b *Dialed, a *absence) error) error {
	b := t.bed.(*Dialed)
	b.mu.Lock()
	defer b.mu.Unlock()
	a, err := b.absent()
	if err != nil {
		return err
	}
	defer a.back()
	return play(b, a)
}

func playOriginRefused(t *trial) error {
	return absently(t, func(b *Dialed, a *absence) error {
		origin := a.ln.Addr()
		if err := refuse(a.ln); err != nil {
			return err
		}
		c := t.call(b, origin)
		defer c.abandon()
		if !c.told(t.leaving()) {
			return fmt.Errorf("the client was not told in %v that its origin refuses", t.leaving())
		}
		if c.err != nil {
			t.note("the client is told: %v", c.err)
			return nil
		}
		client, err := t.newEnd(c.conn, "client", 0, tcpCaps)
		if err != nil {
			return err
		}
		if b.Handshake != nil {
			return client.errorf("was told yes, and its origin refuses")
		}
		// The client only listens. If it wrote, a relay that closes might leave that unread, and send a
		// reset by accident.
		return client.expectBroken(t.leaving())
	})
}

// pending is how long an origin is silent before something happens.
const pending = 300 * time.Millisecond

// nextSYN is when a dial that goes on has tried again: the second SYN is 1 s behind the first.
const nextSYN = 1300 * time.Millisecond

func playOriginSilent(t *trial) error {
	return absently(t, func(b *Dialed, a *absence) error {
		if err := a.silence(); err != nil {
			return err
		}
		c := t.call(b, a.ln.Addr())
		defer c.abandon()
		// A dial that goes on when the client has left must not meet the next scenario's origin.
		defer func() {
			if conn := a.answer(nextSYN); conn != nil {
				conn.Close()
			}
		}()
		if !c.told(t.Prompt + pending) {
			return nil
		}
		if c.err != nil {
			return fmt.Errorf("the client was told no while its origin might still answer: %w", c.err)
		}
		client, err := t.newEnd(c.conn, "client", 0, tcpCaps)
		if err != nil {
			return err
		}
		if b.Handshake != nil {
			return client.errorf("was told yes, and its origin does not answer")
		}
		client.SetReadDeadline(time.Now().Add(t.Prompt + pending))
		switch n, err := io.Copy(io.Discard, struct{ io.Reader }{client}); {
		case n > 0:
			return client.errorf("got %d bytes from an origin that does not answer", n)
		case err == nil:
			return client.errorf("saw a clean end, and its origin does not answer")
		case !isTimeout(err):
			return client.errorf("was reset while its origin might still answer: %w", err)
		}
		return nil
	})
}

func playOriginLate(t *trial) error {
	return absently(t, func(b *Dialed, a *absence) error {
		if err := a.silence(); err != nil {
			return err
		}
		c := t.call(b, a.ln.Addr())
		var client *end
		if c.told(pending) { // as it is where there is no handshake: then the client goes ahead
			if c.err != nil {
				return fmt.Errorf("while the origin is silent: %w", c.err)
			}
			var err error
			if client, err = t.newEnd(c.conn, "client", 0, tcpCaps); err != nil {
				return err
			}
			if err := client.send([]byte(request)); err != nil {
				return err
			}
			if err := client.closeWrite(); err != nil {
				return err
			}
			time.Sleep(pending)
		}
		conn := a.answer(t.leaving())
		if conn == nil {
			c.abandon()
			return errors.New("the relay did not connect to an origin that was slow to answer")
		}
		origin, err := t.newEnd(conn, "origin", 0, tcpCaps)
		if err != nil {
			return err
		}
		if client == nil {
			if !c.told(t.leaving()) {
				c.abandon()
				return errors.New("the client was not told that its origin has answered at last")
			}
			if c.err != nil {
				return fmt.Errorf("the origin has answered at last: %w", c.err)
			}
			if client, err = t.newEnd(c.conn, "client", 0, tcpCaps); err != nil {
				return err
			}
			if err := client.send([]byte(request)); err != nil {
				return err
			}
			if err := client.closeWrite(); err != nil {
				return err
			}
		}
		if err := origin.expect(request, t.leaving()); err != nil {
			return fmt.Errorf("what was sent while the origin was silent: %w", err)
		}
		if err := origin.expectEnd(t.Prompt); err != nil {
			return fmt.Errorf("the end that was sent while the origin was silent: %w", err)
		}
		if err := origin.send([]byte(verdict)); err != nil {
			return err
		}
		origin.Close()
		if err := client.expect(verdict, 2*t.Prompt); err != nil {
			return err
		}
		return client.expectEnd(t.Prompt)
	})
}

func playDialAbandoned(t *trial) error {
	return absently(t, func(b *Dialed, a *absence) error {
		if err := a.silence(); err != nil {
			return err
		}
		c := t.call(b, a.ln.Addr())
		time.Sleep(pending)
		c.abandon()
		time.Sleep(pending / 2)
		if conn := a.answer(nextSYN); conn != nil {
			conn.Close()
			return errors.New("the relay has connected to the origin for a client that had left")
		}
		return nil
	})
}

// playPortScan does as playMixedEndings does, with clients that leave at once.
func playPortScan(t *trial) error {
	return t.settled("clients that left at once", func() error {
		b := t.bed.(*Dialed)
		b.mu.Lock()
		defer b.mu.Unlock()
		for i := range t.Connections {
			c, err := b.Connect(t.ctx)
			if err != nil {
				return fmt.Errorf("connecting for the %dth time: %w", i+1, err)
			}
			if i/2%2 == 0 && b.Handshake != nil {
				c.Write([]byte{5})
			}
			if i%2 == 0 {
				breakOff(c)
			} else {
				c.Close()
			}
			for i%20 == 19 { // the origin's queue must not fill
				o := acceptWithin(b.Origin, 10*time.Millisecond)
				if o == nil {
					break
				}
				o.Close()
			}
		}
		for {
			c := acceptWithin(b.Origin, 300*time.Millisecond)
			if c == nil {
				break
			}
			c.Close()
		}
		p, err := b.open(t.ctx, b.Origin, plainly)
		if err != nil {
			return fmt.Errorf("after %d clients that left at once: %w", t.Connections, err)
		}
		client, origin, err := t.take(p)
		if err != nil {
			return err
		}
		defer client.Close()
		defer origin.Close()
		return talk(t, client, origin)
	})
}
