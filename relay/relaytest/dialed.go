package relaytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Dialed is the bed of a relay that already runs: connections are dialled through it and accepted
// as its origin. Connections are opened one after the other, so that the two ends belong together.
type Dialed struct {
	// Origin accepts what the relay dials. It belongs to the caller. The scenarios about absent
	// origins make it refuse connections, or ignore them, for a while, unless there is a Handshake:
	// they then ask for other ports.
	Origin net.Listener
	// Connect opens a connection to the relay: see [To].
	Connect func(ctx context.Context) (net.Conn, error)
	// Handshake asks the relay for origin, and returns when the relay has said yes, or an error when
	// it has said no. It must leave in rw what comes behind the relay's answer. It has no limit of
	// time of its own. Nil is for a relay that connects to Origin without being asked.
	Handshake func(rw io.ReadWriter, origin net.Addr) error
	// ClientCaps and OriginCaps are what the legs carry. Zero is what TCP does.
	ClientCaps, OriginCaps Caps
	// Meter measures the relay: [InProcess], [Processes], or one of yours. Nil leaves out what needs that.
	Meter Meter

	mu     sync.Mutex
	strays bool // the relay may still dial for a client that was given up
}

// To returns a Connect for a relay that listens on an address.
func To(network, address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}
}

// Caps implements [Bed].
func (b *Dialed) Caps() (client, origin Caps) {
	client, origin = b.ClientCaps, b.OriginCaps
	if client == 0 {
		client = tcpCaps
	}
	if origin == 0 {
		origin = tcpCaps
	}
	return client, origin
}

// CPU implements [Meter].
func (b *Dialed) CPU() (time.Duration, error) {
	if b.Meter == nil {
		return 0, errors.ErrUnsupported
	}
	return b.Meter.CPU()
}

// Held implements [Meter].
func (b *Dialed) Held() (descriptors, goroutines int, err error) {
	if b.Meter == nil {
		return -1, -1, errors.ErrUnsupported
	}
	return b.Meter.Held()
}

// Open implements [Bed].
func (b *Dialed) Open(ctx context.Context) (*Pair, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if b.strays { // what comes late is not the other end of the next connection
		dropStrays(b.Origin)
	}
	p, err := b.open(ctx, b.Origin, plainly)
	b.strays = err != nil
	return p, err
}

// plainly is a handshake as it should be.
func plainly(c net.Conn) io.ReadWriter { return c }

// open opens a connection to the origin that listens at ln. The handshake runs over what way returns.
// The caller holds b.mu if ln is b.Origin.
func (b *Dialed) open(ctx context.Context, ln net.Listener, way func(net.Conn) io.ReadWriter) (*Pair, error) {
	accepted := make(chan accepting, 1)
	go accept(ln, accepted)
	client, err := b.dial(ctx, ln.Addr(), way)
	if err != nil {
		interrupt(ln, accepted)
		return nil, fmt.Errorf("relaytest: dialling through the relay: %w", err)
	}
	select {
	case a := <-accepted:
		if a.err != nil {
			client.Close()
			return nil, a.err
		}
		return &Pair{Client: client, Origin: a.conn}, nil
	case <-time.After(dialing):
		err = &NotDialed{Client: client, Origin: ln.Addr()}
	case <-ctx.Done():
		err = ctx.Err()
	}
	interrupt(ln, accepted)
	client.Close()
	return nil, err
}

// NotDialed is the error of a relay that takes a connection, and says yes if it is asked, but never
// connects to the origin.
type NotDialed struct {
	Client net.Conn // to the relay; closed
	Origin net.Addr
}

// Error implements error.
func (e *NotDialed) Error() string {
	return fmt.Sprintf("relaytest: the relay has taken a connection and did not connect to the origin %v in %v",
		e.Origin, dialing)
}

// dialing is how long a relay may take to dial the origin.
const dialing = 5 * time.Second

// dial connects to the relay and shakes hands. It ends with ctx.
func (b *Dialed) dial(ctx context.Context, origin net.Addr, way func(net.Conn) io.ReadWriter) (net.Conn, error) {
	c, err := b.Connect(ctx)
	if err != nil || b.Handshake == nil {
		return c, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Now()) })
	err = b.Handshake(way(c), origin)
	if !stop() {
		c.Close()
		return nil, ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

type accepting struct {
	conn net.Conn
	err  error
}

func accept(ln net.Listener, to chan<- accepting) {
	c, err := ln.Accept()
	to <- accepting{c, err}
}

// interrupt ends an accept whose connection did not come, and closes one that came too late.
func interrupt(ln net.Listener, accepted <-chan accepting) {
	d, ok := ln.(interface{ SetDeadline(time.Time) error })
	if !ok {
		ln.Close()
	} else {
		d.SetDeadline(time.Now())
		defer d.SetDeadline(time.Time{})
	}
	if a := <-accepted; a.err == nil {
		a.conn.Close()
	}
}

// acceptWithin accepts one connection, or returns nil when none comes.
func acceptWithin(ln net.Listener, limit time.Duration) net.Conn {
	accepted := make(chan accepting, 1)
	go accept(ln, accepted)
	select {
	case a := <-accepted:
		return a.conn
	case <-time.After(limit):
		interrupt(ln, accepted)
		return nil
	}
}

// dropStrays closes what has come to ln and is nobody's.
func dropStrays(ln net.Listener) {
	for {
		c := acceptWithin(ln, 50*time.Millisecond)
		if c == nil {
			return
		}
		c.Close()
	}
}

// absence is an origin that is not there, for a while.
type absence struct {
	ln  *net.TCPListener
	own bool // it is not the bed's
	// fillers keep the queue of a listener full, so that it ignores whoever connects.
	fillers []net.Conn
}

// absent returns a listener that can be made absent. The caller holds b.mu, and calls back at the end.
func (b *Dialed) absent() (*absence, error) {
	of, ok := b.Origin.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("relaytest: the origin is a %T, not a TCP listener", b.Origin)
	}
	if b.Handshake == nil {
		return &absence{ln: of}, nil
	}
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: of.Addr().(*net.TCPAddr).IP})
	if err != nil {
		return nil, err
	}
	return &absence{ln: ln, own: true}, nil
}

// back makes the origin as it was.
func (a *absence) back() {
	for _, c := range a.fillers {
		c.Close()
	}
	a.fillers = nil
	if a.own {
		a.ln.Close()
		return
	}
	setBacklog(a.ln, 1024)
	dropStrays(a.ln)
}

// silence makes the origin ignore connections, as one behind a firewall that drops packets.
func (a *absence) silence() error {
	if err := setBacklog(a.ln, 0); err != nil {
		return err
	}
	const most = 8
	for range most {
		c, err := net.DialTimeout("tcp", a.ln.Addr().String(), 100*time.Millisecond)
		if err != nil {
			return nil // full
		}
		a.fillers = append(a.fillers, c)
	}
	return errors.New("relaytest: the queue of the origin's listener does not fill")
}

// answer ends the silence and waits for the connection of the relay, which comes with the next SYN
// that its kernel sends. It returns nil if none comes.
func (a *absence) answer(within time.Duration) net.Conn {
	setBacklog(a.ln, 1024)
	own := make(map[string]bool)
	for _, c := range a.fillers {
		own[c.LocalAddr().String()] = true
	}
	for end := time.Now().Add(within); ; {
		c := acceptWithin(a.ln, time.Until(end))
		if c == nil || !own[c.RemoteAddr().String()] {
			return c
		}
		c.Close()
	}
}
