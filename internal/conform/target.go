// Package conform runs the scenarios of relay/relaytest on a relay that is somebody's program: it is
// the client and the origin at once, and looks at the relay from both sides, as a black box.
//
// A [Target] says where the relay is and how it is asked. [Target.Listen] opens the origin and returns
// the bed to play on, and [Target.Probe] finds out at once whether there is a relay at all: most of
// what goes wrong is a wrong address, and then one sentence helps more than sixty failures. [Run]
// plays all scenarios, and its [Report] can be printed, kept as JSON, and put beside others in a table.
package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/connect"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// The ways to ask a relay for its origin.
const (
	Forward = "forward" // not at all: it forwards to one origin
	SOCKS5  = "socks5"
	Connect = "connect" // HTTP CONNECT
)

// Target is a relay to test.
type Target struct {
	Addr proxy.Addr // where it listens
	Mode string     // Forward, SOCKS5 or Connect
	// Origin is where to listen for what the relay forwards. The zero Addr is a free port on loopback,
	// for relays that are asked.
	Origin proxy.Addr
	PIDs   []int // the relay's processes, to measure; may be empty
}

// Listen opens the origin. The caller closes the bed's Origin.
func (t *Target) Listen() (*relaytest.Dialed, error) {
	at := t.Origin
	if at == (proxy.Addr{}) {
		at = proxy.TCP("127.0.0.1", 0)
	}
	ln, err := net.Listen(at.Network, at.HostPort())
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("the origin cannot listen at %v, where somebody else listens: end that, or choose another", at)
	}
	if err != nil {
		return nil, fmt.Errorf("the origin cannot listen at %v: %w", at, err)
	}
	bed := &relaytest.Dialed{Origin: ln, Connect: relaytest.To(t.Addr.Network, t.Addr.HostPort())}
	switch t.Mode {
	case SOCKS5:
		bed.Handshake = handshakeSOCKS5
	case Connect:
		bed.Handshake = handshakeConnect
	}
	if len(t.PIDs) > 0 {
		bed.Meter = relaytest.Processes(t.PIDs...)
		if _, _, err := bed.Meter.Held(); err != nil {
			ln.Close()
			return nil, err
		}
	}
	return bed, nil
}

func handshakeSOCKS5(rw io.ReadWriter, origin net.Addr) error {
	host, port, err := hostPort(origin)
	if err != nil {
		return err
	}
	var c socks5.Client
	_, err = c.Handshake(rw, socks5.Connect, socks5.Addr{Host: host, Port: port})
	return err
}

func handshakeConnect(rw io.ReadWriter, origin net.Addr) error {
	host, port, err := hostPort(origin)
	if err != nil {
		return err
	}
	if err := connect.WriteRequest(rw, host, port, "", ""); err != nil {
		return err
	}
	_, err = connect.ReadResponse(oneByOne{rw}) // so that nothing behind the head is read
	return err
}

func hostPort(a net.Addr) (string, uint16, error) {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return "", 0, fmt.Errorf("conform: a proxy cannot be asked for a %s address", a.Network())
	}
	return tcp.IP.String(), uint16(tcp.Port), nil
}

type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(p []byte) (int, error) { return o.r.Read(p[:min(len(p), 1)]) }

// Probing is how long Probe waits for each thing that a relay does at once.
const Probing = 3 * time.Second

// Probe opens one connection through the relay and sends a few bytes each way. Its error is a
// sentence for the person who has given the address.
func (t *Target) Probe(ctx context.Context, bed *relaytest.Dialed) error {
	ctx, cancel := context.WithTimeout(ctx, 2*Probing)
	defer cancel()
	client, err := bed.Connect(ctx)
	if err != nil {
		return t.unreachable(err)
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(Probing))
	accepted := make(chan net.Conn, 1)
	if d, ok := bed.Origin.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Now().Add(Probing))
		defer d.SetDeadline(time.Time{})
	}
	go acceptOne(bed.Origin, accepted)
	if bed.Handshake != nil {
		if err := bed.Handshake(client, bed.Origin.Addr()); err != nil {
			if c := <-accepted; c != nil {
				c.Close()
				return fmt.Errorf("%v does not speak %s: it connects to the origin without being asked "+
					"(it is a plain forward: leave out --%s)", t.Addr, protocol(t.Mode), t.Mode)
			}
			return t.unasked(ctx, bed, err)
		}
	}
	origin := <-accepted
	if origin == nil {
		return t.undialed(ctx, bed, client)
	}
	defer origin.Close()
	origin.SetDeadline(time.Now().Add(Probing))
	for _, way := range []struct {
		from, to net.Conn
		text     string
	}{
		{client, origin, "from client to origin\n"},
		{origin, client, "from origin to client\n"},
	} {
		if err := t.say(way.from, way.to, way.text); err != nil {
			return err
		}
	}
	return nil
}

func acceptOne(ln net.Listener, to chan<- net.Conn) {
	c, _ := ln.Accept()
	to <- c
}

func (t *Target) unreachable(err error) error {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nothing listens at %v: connection refused", t.Addr)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("nothing listens at %v: there is no such file", t.Addr)
	}
	return fmt.Errorf("%v cannot be connected to: %w", t.Addr, err)
}

// unasked says what is wrong with a relay whose handshake has failed.
func (t *Target) unasked(ctx context.Context, bed *relaytest.Dialed, err error) error {
	var reply socks5.Reply
	var status *connect.StatusError
	hint := t.hint(ctx, bed)
	switch {
	case errors.As(err, &reply), errors.As(err, &status):
		return fmt.Errorf("%v speaks %s, but will not connect to the origin at %v: %s",
			t.Addr, protocol(t.Mode), bed.Origin.Addr(), short(err))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%v does not answer a handshake of %s within %v%s", t.Addr, protocol(t.Mode), Probing, hint)
	}
	return fmt.Errorf("%v does not speak %s: %s%s", t.Addr, protocol(t.Mode), short(err), hint)
}

// undialed says what is wrong with a relay that does not connect to the origin.
func (t *Target) undialed(ctx context.Context, bed *relaytest.Dialed, client net.Conn) error {
	origin := bed.Origin.Addr()
	hint := t.hint(ctx, bed)
	if t.Mode != Forward {
		return fmt.Errorf("%v says that it has connected to the origin at %v, and has not within %v: "+
			"does it run on another machine, where that is another address? (--origin)", t.Addr, origin, Probing)
	}
	client.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	said := make([]byte, 60)
	n, err := client.Read(said)
	switch {
	case n > 0:
		return fmt.Errorf("%v is no relay to %v: it does not connect there, and says %q itself%s",
			t.Addr, origin, said[:n], hint)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%v takes connections and does not connect to %v within %v: is it a relay, "+
			"and does it forward there?%s", t.Addr, origin, Probing, hint)
	}
	return fmt.Errorf("%v takes connections and closes them, and does not connect to %v: is it a relay, "+
		"and does it forward there?%s", t.Addr, origin, hint)
}

// hint says what the relay speaks where that is something else than was thought.
func (t *Target) hint(ctx context.Context, bed *relaytest.Dialed) string {
	answer := func(question string) string {
		c, err := bed.Connect(ctx)
		if err != nil {
			return ""
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second / 2))
		io.WriteString(c, question)
		b := make([]byte, 500)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	if t.Mode != SOCKS5 && answer("\x05\x01\x00") == "\x05\x00" {
		return " (it speaks SOCKS5: use --socks5)"
	}
	host := bed.Origin.Addr().String()
	said := answer("CONNECT " + host + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
	if t.Mode != Connect && strings.HasPrefix(said, "HTTP/1.1 200") && !strings.Contains(said, "Content-") { // no page
		return " (it speaks HTTP CONNECT: use --connect)"
	}
	return ""
}

// say sends text one way and looks whether it arrives as it was.
func (t *Target) say(from, to net.Conn, text string) error {
	if _, err := io.WriteString(from, text); err != nil {
		return fmt.Errorf("%v has connected to the origin, and then broken off: %w", t.Addr, err)
	}
	got := make([]byte, len(text))
	n, err := io.ReadFull(to, got)
	if string(got[:n]) != text[:n] {
		return fmt.Errorf("%v is no plain relay: for %q, %q arrives (does it send PROXY headers, or speak TLS?)",
			t.Addr, text, got[:n])
	}
	if err != nil {
		return fmt.Errorf("%v has connected to the origin, and what is sent %s does not arrive: %w",
			t.Addr, strings.TrimSpace(text), err)
	}
	return nil
}

func protocol(mode string) string {
	return map[string]string{SOCKS5: "SOCKS5", Connect: "HTTP CONNECT"}[mode]
}

// short drops the package's name from an error.
func short(err error) string {
	s := err.Error()
	for _, p := range []string{"socks5: ", "connect: "} {
		s = strings.TrimPrefix(s, p)
	}
	return s
}

// Describe says what is tested, in a few words.
func (t *Target) Describe(origin net.Addr) string {
	switch t.Mode {
	case SOCKS5:
		return t.Addr.String() + ", a SOCKS5 proxy"
	case Connect:
		return t.Addr.String() + ", an HTTP proxy (CONNECT)"
	}
	return t.Addr.String() + ", a plain forward to " + origin.String()
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + " s" }
