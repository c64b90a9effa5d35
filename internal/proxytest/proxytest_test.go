package proxytest

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

func TestOrigins(t *testing.T) {
	for _, network := range []string{"tcp", "tcp6", "unix", "tls"} {
		t.Run(network, func(t *testing.T) {
			NoLeaks(t)
			o := Listen(t, network, AfterEOF(func(b []byte) []byte { return append(b, '!') }))
			c := Dial(t, o.Addr)
			if network == "tls" {
				c = tls.Client(c, &tls.Config{RootCAs: o.Roots, ServerName: "localhost"})
			}
			io.WriteString(c, "hello")
			closeWrite(c)
			if b, err := io.ReadAll(c); string(b) != "hello!" || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
			if o.Accepted() != 1 {
				t.Errorf("accepted %d", o.Accepted())
			}
		})
	}
}

func TestEchoChargenAbort(t *testing.T) {
	NoLeaks(t)
	const n = 300_000
	c := Dial(t, Listen(t, "tcp", Chargen(n)).Addr)
	got, err := io.ReadAll(c)
	want, _ := io.ReadAll(io.LimitReader(Pattern(), n))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("chargen: %d bytes, %v", len(got), err)
	}
	c = Dial(t, Listen(t, "tcp", Echo).Addr)
	io.WriteString(c, "x")
	closeWrite(c)
	if b, err := io.ReadAll(c); string(b) != "x" || err != nil {
		t.Errorf("echo: %q, %v", b, err)
	}
	c = Dial(t, Listen(t, "tcp", Abort).Addr)
	io.WriteString(c, "x")
	if !Resets(c) {
		t.Error("Abort: no reset")
	}
	c = Dial(t, Listen(t, "tcp", func(net.Conn) {}).Addr)
	if Resets(c) {
		t.Error("Resets takes a clean end for a reset")
	}
	// An origin ends although its client stays.
	Dial(t, Listen(t, "tcp", Sink).Addr)
}

func TestRecordingHandler(t *testing.T) {
	p := &pendingPipe{}
	h := &RecordingHandler{Err: os.ErrPermission}
	h.HandleStream(t.Context(), proxy.Flow{User: "ann"}, p)
	if p.rejected != os.ErrPermission || p.done != 1 || len(h.Flows()) != 1 || h.Flows()[0].User != "ann" {
		t.Errorf("%+v, flows %v", p, h.Flows())
	}
	var got string
	h = &RecordingHandler{Serve: func(c net.Conn) { b, _ := io.ReadAll(c); got = string(b) }}
	h.HandleStream(t.Context(), proxy.Flow{}, p)
	if got != "head tail" || p.done != 2 {
		t.Errorf("served %q, %+v", got, p)
	}
	var d ScriptedDialer
	if _, err := d.DialStream(t.Context(), proxy.TCP("x", 1)); !errors.Is(err, syscall.ECONNREFUSED) || len(d.Dialed()) != 1 {
		t.Errorf("dialer: %v, %v", err, d.Dialed())
	}
}

type pendingPipe struct {
	rejected error
	done     int
}

func (p *pendingPipe) Accept() (net.Conn, []byte, error) {
	c, d := net.Pipe()
	go func() { io.WriteString(d, "tail"); d.Close() }()
	return c, []byte("head "), nil
}
func (p *pendingPipe) Reject(err error) { p.rejected = err }
func (p *pendingPipe) Done()            { p.done++ }

// recorder is a testing.TB that keeps what NoLeaks says.
type recorder struct {
	testing.TB
	cleanup []func()
	said    []string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanup = append(r.cleanup, f) }
func (r *recorder) Errorf(f string, a ...any) { r.said = append(r.said, fmt.Sprintf(f, a...)) }

func TestNoLeaksFindsLeaks(t *testing.T) {
	r := &recorder{TB: t}
	noLeaks(r, 50*time.Millisecond)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	stay := make(chan struct{})
	defer close(stay)
	go leaking(stay)
	r.cleanup[0]()
	said := strings.Join(r.said, "\n")
	for _, want := range []string{"proxytest.leaking", "a descriptor is left", ": tcp ", "1 goroutines and 1 descriptors"} {
		if !strings.Contains(said, want) {
			t.Errorf("NoLeaks does not say %q:\n%s", want, said)
		}
	}
}

// A listener may be taken over by another descriptor while a test begins. That is no leak, but a second descriptor is.
func TestNoLeaksLetsDescriptorsMove(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{TB: t}
	noLeaks(r, 50*time.Millisecond)
	moved, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer moved.Close()
	r.cleanup[0]()
	if len(r.said) == 0 {
		t.Error("NoLeaks does not count the descriptors of a socket")
	}
	r.said = nil
	ln.Close()
	r.cleanup[0]()
	if len(r.said) > 0 {
		t.Errorf("NoLeaks takes a socket for another:\n%s", strings.Join(r.said, "\n"))
	}
}

func leaking(stay chan struct{}) { <-stay }

// The relay's loop stays for a second after its last session, with the pipes it has spliced through. That is
// no leak, and nothing that a test waits for.
func TestNoLeaksExcusesTheLoop(t *testing.T) {
	r := &recorder{TB: t}
	noLeaks(r, 500*time.Millisecond)
	const n = 4 << 20 // enough to be spliced
	source, drain := Listen(r, "tcp", Chargen(n)), Listen(r, "tcp", func(c net.Conn) {
		if got, err := io.Copy(io.Discard, struct{ io.Reader }{c}); got != n || err != nil {
			t.Errorf("relayed %d bytes, %v", got, err)
		}
	})
	a, err := net.Dial("tcp", source.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	b, err := net.Dial("tcp", drain.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	relay.Join(t.Context(), a, b)
	for i := len(r.cleanup) - 1; i >= 0; i-- {
		r.cleanup[i]()
	}
	if len(r.said) > 0 {
		t.Errorf("NoLeaks takes the relay's loop for a leak:\n%s", strings.Join(r.said, "\n"))
	}
}

func TestExceptPipes(t *testing.T) {
	files := []string{"3 pipe:[1]", "4 pipe:[1]", "5 pipe:[2]", "6 pipe:[2]", "7 pipe:[3]", "8 socket:[4]"}
	for most, want := range map[int]int{0: 6, 1: 4, 2: 2, 3: 2} { // one end alone is no pipe of a loop
		if got := exceptPipes(files, most); len(got) != want {
			t.Errorf("but for %d pipes: %v", most, got)
		}
	}
}
