package relaytest

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// With no relay at all, every scenario passes over every transport.
func TestDirect(t *testing.T) {
	var runs []*run
	for _, l := range Legs() {
		o := Options{Bytes: 1 << 20, Rounds: 40, Silence: 100 * time.Millisecond}
		if l.Name == "tcp" {
			o = Options{}
		}
		r := newRun(l.Name, Direct(l), o)
		if l.Name != "tcp" && l.Name != "stream" {
			r.alone = nil // they take long, and there is a kernel's conn and one that is not
		}
		runs = append(runs, r)
	}
	playAll(t.Context(), runs)
	for _, r := range runs {
		t.Run(r.name, r.report)
	}
}

// The same for the bed that dials, where the relay's address is the origin's own.
func TestDialedDirect(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	bed := &Dialed{Origin: ln, Connect: To("tcp", ln.Addr().String()), Meter: InProcess()}
	RunBed(t, bed, Options{Rounds: 40, Bytes: 1 << 20})
}

// A relay that takes connections and dials nobody, or cannot be dialled, ends an Open with a reason.
func TestDialedToNoRelay(t *testing.T) {
	origin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	deaf, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bed := &Dialed{Origin: origin, Connect: To("tcp", deaf.Addr().String())}
	ctx, cancel := context.WithCancelCause(t.Context())
	gaveUp := errors.New("gave up")
	go func() {
		c, err := deaf.Accept()
		if err == nil {
			defer c.Close()
		}
		cancel(gaveUp)
		if c != nil {
			io.Copy(io.Discard, c)
		}
	}()
	if _, err := bed.Open(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a relay that dials nobody: %v", err)
	}
	deaf.Close()
	if _, err := bed.Open(t.Context()); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nothing listens: %v", err)
	}
	// And the bed is as good as before.
	bed.Connect = To("tcp", origin.Addr().String())
	p, err := bed.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.Client.Close()
	p.Origin.Close()
}
