package relaytest

import (
	"fmt"
	"io"
	"time"
)

func vanishScenarios() []Scenario {
	s := either(Scenario{
		Name:    "vanished",
		Meaning: "an end that writes to a machine that has restarted is told that its connection is gone",
		Harm:    "A program that sends to a machine that has crashed is never told, and waits for hours.",
		needs:   canVanish,
	}, Vanish, 0, playVanished)
	s = append(s, either(Scenario{
		Name:    "vanished-idle",
		Meaning: "a machine that has vanished is missed although nobody writes, by keepalive",
		Harm:    "Connections of laptops that were closed and phones that left pile up on the relay and the origin for hours.",
		Level:   Should,
		needs:   canVanishIdle,
	}, Vanish, 0, playVanishedIdle)...)
	return s
}

func canVanish(Bed, Options) string {
	if err := repairable(); err != nil {
		return "to vanish without a word takes TCP_REPAIR, and that takes root: " + err.Error()
	}
	return ""
}

// keepalive is how long a connection may be idle before it is asked whether its other end is there:
// the 15 s of Go's net, and a second.
const keepalive = 16 * time.Second

func canVanishIdle(b Bed, o Options) string {
	if o.Silence < 3*time.Second {
		return fmt.Sprintf("keepalive takes %v: play it with a Silence of 3 s or more", keepalive)
	}
	return canVanish(b, o)
}

func playVanished(t *trial, from side) error {
	near, far, err := talked(t, from)
	if err != nil {
		return err
	}
	if err := near.vanish(); err != nil {
		return err
	}
	return far.expectWritesFail(2 * t.Prompt)
}

func playVanishedIdle(t *trial, from side) error {
	near, far, err := talked(t, from)
	if err != nil {
		return err
	}
	time.Sleep(still) // for the last acknowledgement: what is not acknowledged is sent again, and answered
	if err := near.vanish(); err != nil {
		return err
	}
	within := min(keepalive+t.Silence/2, t.Timeout-time.Second)
	far.SetReadDeadline(time.Now().Add(within))
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{far}); isTimeout(err) {
		return far.errorf("was not told in %v, by an end or a reset, that the other side has gone", within)
	}
	return nil
}

// vanish takes the end's socket away. Its other side is told nothing; what it sends from now on is
// answered as a machine answers that has restarted.
func (e *end) vanish() error {
	e.left(Vanished)
	if e.tcp == nil {
		return e.errorf("is a %T, which cannot vanish", e.Conn)
	}
	if err := setRepair(e.sock); err != nil {
		return e.errorf("could not vanish: %w", err)
	}
	return e.tcp.Close()
}
