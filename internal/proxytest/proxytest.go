// Package proxytest has what tests of the proxy need: real programs that are started, awaited and
// reaped ([Start]), origins on real listeners ([Listen]), a handler and a dialer to stand in for the
// engine and its way out ([RecordingHandler], [ScriptedDialer]), and a check that nothing is left
// behind ([NoLeaks]). It is for tests only.
package proxytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// Patience is how long the helpers wait for what should come at once; machines may be busy.
const Patience = 20 * time.Second

// Need skips the test if one of the programs is not installed; with SLUICE_TEST_NOSKIP set, it fails.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			skip(t, p+" is not installed")
		}
	}
}

// NeedRoot skips the test if it does not run as root; with SLUICE_TEST_NOSKIP set, it fails.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
}

func skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("SLUICE_TEST_NOSKIP") != "" {
		t.Fatal(why + ", and SLUICE_TEST_NOSKIP is set")
	}
	t.Skip(why)
}

// FreePort returns a port that nobody listens at on any address, for programs that cannot choose one
// themselves. It is not one of those that the kernel gives to who asks for any (from 32768 on), so
// that only another random choice could take it before they do.
func FreePort(t testing.TB) uint16 {
	t.Helper()
	for range 100 {
		port := uint16(10000 + rand.IntN(22000))
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			continue
		}
		ln.Close()
		return port
	}
	t.Fatal("a hundred ports are in use")
	return 0
}

// Dial connects to a within Patience, and closes the conn at the test's end.
func Dial(t testing.TB, a proxy.Addr) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(a.Network, a.HostPort(), Patience)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(Patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// Resets reads c to its end and says whether that was a reset, not a clean end or silence.
func Resets(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(Patience))
	_, err := io.Copy(io.Discard, c)
	return errors.Is(err, syscall.ECONNRESET)
}

// Until waits for cond, and fails the test if it does not come true within Patience.
func Until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// RecordingHandler is a proxy.Handler that stands in for the engine: it records the flows and answers
// each client at once.
type RecordingHandler struct {
	Err   error          // each client is rejected with it; nil: accepted
	Serve func(net.Conn) // gets the conns of accepted clients, their head put back; nil: Echo

	mu    sync.Mutex
	flows []proxy.Flow
	errs  []error
}

// HandleStream implements proxy.Handler. It returns when the session is over.
func (h *RecordingHandler) HandleStream(_ context.Context, f proxy.Flow, p proxy.Pending) {
	defer p.Done()
	h.mu.Lock()
	h.flows = append(h.flows, f)
	h.mu.Unlock()
	if h.Err != nil {
		p.Reject(h.Err)
		return
	}
	c, head, err := p.Accept()
	if err != nil {
		h.mu.Lock()
		h.errs = append(h.errs, err)
		h.mu.Unlock()
		return
	}
	serve := h.Serve
	if serve == nil {
		serve = Echo
	}
	c = relay.WithHead(c, head)
	serve(c)
	c.Close()
}

// HandlePackets implements proxy.Handler: it sends each datagram back to where it came from, as from the place it was for.
func (h *RecordingHandler) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	h.mu.Lock()
	h.flows = append(h.flows, f)
	h.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	if h.Err != nil {
		if r, ok := c.(relay.Refuser); ok {
			r.Refuse(f.Dst.Endpoint(), h.Err)
		}
		return
	}
	var p relay.Packet
	defer p.Free()
	for c.ReadPacket(&p) == nil {
		if c.WritePacket(&p) != nil {
			return
		}
	}
}

// Flows returns the flows so far.
func (h *RecordingHandler) Flows() []proxy.Flow {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]proxy.Flow(nil), h.flows...)
}

// Errs returns the errors of Accept so far.
func (h *RecordingHandler) Errs() []error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]error(nil), h.errs...)
}

// ScriptedDialer is a proxy.Dialer that does what Script says, and records what was asked of it.
type ScriptedDialer struct {
	Script func(ctx context.Context, dst proxy.Addr) (net.Conn, error) // nil: every dial is refused

	mu   sync.Mutex
	dsts []proxy.Addr
}

// DialStream implements proxy.Dialer.
func (d *ScriptedDialer) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	d.mu.Lock()
	d.dsts = append(d.dsts, dst)
	d.mu.Unlock()
	if d.Script == nil {
		return nil, fmt.Errorf("proxytest: %v: %w", dst, syscall.ECONNREFUSED)
	}
	return d.Script(ctx, dst)
}

// Dialed returns the destinations so far.
func (d *ScriptedDialer) Dialed() []proxy.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]proxy.Addr(nil), d.dsts...)
}
