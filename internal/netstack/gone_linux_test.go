package netstack

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

// A device that goes while the last sessions are being finished ends them.
func TestDeviceGoneWhileDraining(t *testing.T) {
	proxytest.NoLeaks(t)
	held := make(chan struct{})
	h := &proxytest.RecordingHandler{Serve: func(c net.Conn) { close(held); proxytest.Sink(c) }}
	w := &failingWire{wire: newWire()}
	s := new(Stack)
	if err := s.listenOn(w); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), abortedWith{h}) }()
	proxytest.Until(t, "Serve", func() bool { return serving(s) })
	g := &rig{t: t, wire: w.wire, stack: s}
	g.open(1000, 0)
	within(t, "the stream", held)
	s.Close()
	w.wire.Close() // as if it were deleted
	if err := within(t, "the end of Serve", served); !errors.Is(err, tundev.ErrGone) {
		t.Errorf("Serve: %v", err)
	}
}

// failingWire fails as a device that was deleted does.
type failingWire struct{ *wire }

func (w *failingWire) ReadPacket(h *tundev.Header, b [][]byte) (int, error) {
	w.wire.ReadPacket(h, b)
	return 0, tundev.ErrGone
}

// abortedWith aborts a stream at the end of its context, as an Engine does.
type abortedWith struct{ *proxytest.RecordingHandler }

func (a abortedWith) HandleStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	a.RecordingHandler.HandleStream(ctx, f, aborted{p, ctx})
}

type aborted struct {
	proxy.Pending
	ctx context.Context
}

func (a aborted) Accept() (net.Conn, []byte, error) {
	c, head, err := a.Pending.Accept()
	if err == nil {
		context.AfterFunc(a.ctx, func() { relay.Abort(c) })
	}
	return c, head, err
}
