package inbound

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Capture brings traffic that is on its way elsewhere to an inbound.
type Capture interface {
	// Begin begins to, at the addresses that the inbound listens at. It does all or nothing.
	Begin(at []netip.AddrPort) error
	// Stop leaves new traffic alone; what has been brought here still is.
	Stop() error
	// End undoes all. It may be called twice, and before Begin.
	End() error
}

// transparent is what Redirect and TProxy share: clients that do not know of us, and wanted to go elsewhere. There is no
// handshake; the kernel says where a client was going.
//
// One at the IPv4 loopback address listens at that of IPv6, too, where there is one: a program on this machine must not
// get past it by having two ways to a destination.
type transparent struct {
	listeners []*Listener
	packets   []*demux
	// listenPackets adds to packets; nil: there are none.
	listenPackets func(ctx context.Context, at []netip.AddrPort) error
	// destination says where a client was going.
	destination func(c *client) (netip.AddrPort, error)
	capture     Capture // nil: somebody else brings the traffic
	hint        string  // for a client whose destination is this inbound

	mu      sync.Mutex
	serving bool
	closed  bool

	at []netip.AddrPort // where the listeners listen

	episodes sync.Mutex
	looping  episode // of clients without a destination
}

// errDirect says that a client was not brought here, but has connected to us.
var errDirect = errors.New("inbound: the client connected to this port itself")

// listen binds l, and its twin.
func (t *transparent) listen(ctx context.Context, l *Listener) error {
	if l.Addr.Network != "tcp" {
		return fmt.Errorf("inbound: cannot listen at %v: transparent proxying has no Unix sockets: %w", l.Addr, errors.ErrUnsupported)
	}
	const tries = 10 // to find a port that is free at both addresses
	for try := 1; ; try++ {
		err := t.listenOnce(ctx, l)
		if err == nil {
			break
		}
		if l.Addr.Port != 0 || try == tries || !errors.Is(err, syscall.EADDRINUSE) {
			return err
		}
	}
	if t.capture == nil {
		return nil
	}
	if err := t.capture.Begin(t.at); err != nil {
		t.closeAll()
		return err
	}
	return nil
}

func (t *transparent) listenOnce(ctx context.Context, l *Listener) (err error) {
	first := *l
	t.listeners, t.at, t.packets = nil, nil, nil
	if err := t.add(ctx, &first); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			t.closeAll()
		} else {
			*l = first // it is the same listener now
		}
	}()
	if err := t.addTwin(ctx, &first); err != nil || t.listenPackets == nil {
		return err
	}
	return t.listenPackets(ctx, t.at)
}

// addTwin listens at the IPv6 loopback address as well, if l listens at that of IPv4.
func (t *transparent) addTwin(ctx context.Context, l *Listener) error {
	if l.Addr.Host != "localhost" && l.Addr.IP() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		return nil
	}
	at := addrPort(l.BoundAddr())
	if at.Addr().Is6() {
		return nil // localhost, without IPv4
	}
	twin := *l
	twin.s, twin.pool = nil, l.s.slots
	twin.Addr = proxy.TCP("::1", at.Port())
	err := t.add(ctx, &twin)
	if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return nil // no IPv6 here
	}
	return err
}

func (t *transparent) add(ctx context.Context, l *Listener) error {
	if err := l.Listen(ctx); err != nil {
		return err
	}
	if err := l.silent(); err != nil {
		return err
	}
	t.listeners = append(t.listeners, l)
	t.at = append(t.at, l.BoundAddr().(*net.TCPAddr).AddrPort())
	return nil
}

func (t *transparent) closeAll() (err error) {
	for _, l := range t.listeners {
		err = errors.Join(err, l.Close())
	}
	for _, d := range t.packets {
		err = errors.Join(err, d.Close())
	}
	return err
}

// serve serves all listeners. The capture ends when the last session has.
func (t *transparent) serve(ctx context.Context, h proxy.Handler) error {
	t.mu.Lock()
	t.serving = !t.closed
	t.mu.Unlock()
	errs := make([]error, len(t.listeners)+len(t.packets))
	var all sync.WaitGroup
	for i, l := range t.listeners {
		all.Go(func() { errs[i] = t.serveListener(ctx, h, l) })
	}
	for i, d := range t.packets {
		all.Go(func() { errs[len(t.listeners)+i] = d.serve(ctx, h) })
	}
	all.Wait()
	return errors.Join(append(errs, t.end())...)
}

// end ends the capture.
func (t *transparent) end() error {
	if t.capture == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.capture.End()
}

// close stops the capture of new traffic, and accepting.
func (t *transparent) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	var err error
	switch {
	case t.capture == nil:
	case t.serving:
		err = t.capture.Stop() // sessions go on
	default:
		err = t.capture.End()
	}
	return errors.Join(err, t.closeAll())
}

func (t *transparent) serveListener(ctx context.Context, h proxy.Handler, l *Listener) error {
	handle := func(ctx context.Context, c *client) { t.serveClient(ctx, h, c) }
	q, _ := h.(proxy.NowHandler)
	now := func(ctx context.Context, c *client) bool {
		if q == nil {
			return false
		}
		f, ok := t.flow(c)
		return !ok || q.HandleStreamNow(ctx, f, &forwardPending{c, 0})
	}
	// It pauses where the pool is empty, where serve would keep a slot for its next client from the other listener.
	if l.serveSockets(ctx, handle, now) {
		return nil
	}
	return l.serve(ctx, handle)
}

func (t *transparent) serveClient(ctx context.Context, h proxy.Handler, c *client) {
	if f, ok := t.flow(c); ok {
		h.HandleStream(ctx, f, &forwardPending{c, 0})
	}
}

// flow returns where c wants to go. Where that is this inbound, c is refused, and the session over.
func (t *transparent) flow(c *client) (proxy.Flow, bool) {
	dst, err := t.destination(c)
	if err == nil && t.isOwn(dst) {
		err = errDirect
	}
	if err != nil {
		t.refuse(c, err)
		return proxy.Flow{}, false
	}
	f := c.flow(proxy.TCP(dst.Addr().String(), dst.Port()), "")
	f.Local = dst
	return f, true
}

// refuse resets c, and says why, once per episode: it may be one of many, or the same again and again.
func (t *transparent) refuse(c *client, err error) {
	t.episodes.Lock()
	begins := t.looping.begins()
	t.episodes.Unlock()
	if begins {
		hint := "it has to be brought here by a rule of the packet filter"
		if errors.Is(err, errDirect) {
			hint = t.hint
		}
		c.l.s.say(slog.LevelWarn, "client refused: it has no destination but this inbound", "client", c.peer, "err", err, "hint", hint)
	}
	c.abort()
	c.Done()
}

// isOwn says whether who connects to a comes to this inbound.
func (t *transparent) isOwn(a netip.AddrPort) bool {
	for _, b := range t.at {
		switch {
		case b.Port() != a.Port():
		case b.Addr().Unmap() == a.Addr():
			return true
		case b.Addr().IsUnspecified() && (a.Addr().IsLoopback() || isOfThisMachine(a.Addr())):
			return true
		}
	}
	return false
}
