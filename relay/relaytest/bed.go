package relaytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"time"
)

// Bed is where scenarios get their connections from. Its methods may be called at a time.
//
// A Bed that is a [Meter] as well can have measured what the relay uses.
type Bed interface {
	// Open opens one new connection through the relay and returns its two ends.
	Open(ctx context.Context) (*Pair, error)
	// Caps says what the legs can carry. Scenarios that need more are left out.
	Caps() (client, origin Caps)
}

// Pair is a connection through the relay, held by its ends.
type Pair struct {
	// Client and Origin can read under a deadline. What their Caps promise is found by methods:
	// CloseWrite() error, and Abort() error for a reset where neither they nor what their NetConn()
	// returns is a [net.TCPConn].
	Client, Origin net.Conn
	// Done is closed when the relay is done with the connection. Nil where that cannot be seen.
	Done <-chan struct{}

	relayed []io.Closer // kept from the garbage collector, which would close what the relay has not
}

// Meter measures the process that relays.
type Meter interface {
	// CPU returns the processor time used so far.
	CPU() (time.Duration, error)
	// Held returns how many descriptors and goroutines (or threads, or processes) there are; a
	// figure that is not known is -1.
	Held() (descriptors, goroutines int, err error)
}

// InProcess returns the Meter of a relay that runs in the process of the test. The test must not
// run in parallel with others.
func InProcess() Meter { return inProcess{} }

type inProcess struct{}

func (inProcess) CPU() (time.Duration, error) { return cpuTime(), nil }

func (inProcess) Held() (int, int, error) {
	runtime.GC() // sync.Pools, such as that of io.Copy's pipes, let go
	return descriptors(), runtime.NumGoroutine(), nil
}

// Direct returns the bed of no relay at all: client and origin are the ends of one connection.
// Every scenario passes on it.
func Direct(l Leg) Bed { return direct{leg: l} }

type direct struct {
	inProcess
	leg Leg
}

func (b direct) Caps() (client, origin Caps) { return b.leg.Caps, b.leg.Caps }

func (b direct) Open(ctx context.Context) (*Pair, error) {
	client, origin, err := b.leg.Pair(ctx)
	if err != nil {
		return nil, err
	}
	return &Pair{Client: client, Origin: origin}, nil
}

// Joined returns the bed of a function that joins the relay's ends of two legs, owns them, and
// returns when it has closed both. Its context is never cancelled.
func Joined(client, origin Leg, join func(ctx context.Context, client, origin io.ReadWriteCloser)) Bed {
	return &joined{client: client, origin: origin, join: join}
}

type joined struct {
	inProcess
	client, origin Leg
	join           func(ctx context.Context, client, origin io.ReadWriteCloser)
}

func (b *joined) Caps() (client, origin Caps) { return b.client.Caps, b.origin.Caps }

func (b *joined) Open(ctx context.Context) (*Pair, error) {
	client, rc, err := b.client.Pair(ctx)
	if err != nil {
		return nil, err
	}
	origin, ro, err := b.origin.Pair(ctx)
	if err != nil {
		client.Close()
		rc.Close()
		return nil, err
	}
	done := make(chan struct{})
	go b.relay(context.WithoutCancel(ctx), b.client.relayed(rc), b.origin.relayed(ro), done)
	return &Pair{Client: client, Origin: origin, Done: done, relayed: []io.Closer{rc, ro}}, nil
}

func (b *joined) relay(ctx context.Context, client, origin io.ReadWriteCloser, done chan<- struct{}) {
	defer close(done)
	b.join(ctx, client, origin)
}

func (l Leg) relayed(c net.Conn) io.ReadWriteCloser {
	if l.Relayed == nil {
		return c
	}
	return l.Relayed(c)
}

// Dialed is the bed of a relay that already runs: connections are dialled through it and accepted
// as its origin. Connections are opened one after the other, so that the two ends belong together.
type Dialed struct {
	// Origin accepts what the relay dials. It belongs to the caller.
	Origin net.Listener
	// Dial opens a connection through the relay to origin, Origin's address, and does the relay's
	// handshake if it has one. It returns the conn bare, with nothing of the stream read.
	Dial func(ctx context.Context, origin net.Addr) (net.Conn, error)
	// ClientCaps and OriginCaps are what the legs carry. Zero is what TCP does.
	ClientCaps, OriginCaps Caps
	// Meter measures the relay: [InProcess], or one of yours. Nil leaves out what needs that.
	Meter Meter

	mu sync.Mutex
}

// Forward returns a Dial for a relay that listens on an address and forwards what comes to one origin.
func Forward(network, address string) func(context.Context, net.Addr) (net.Conn, error) {
	return func(ctx context.Context, _ net.Addr) (net.Conn, error) {
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
	accepted := make(chan accepting, 1)
	go b.accept(accepted)
	client, err := b.Dial(ctx, b.Origin.Addr())
	if err != nil {
		b.interrupt(accepted)
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
		err = fmt.Errorf("relaytest: the relay has taken a connection and did not dial the origin %v in %v",
			b.Origin.Addr(), dialing)
	case <-ctx.Done():
		err = ctx.Err()
	}
	client.Close()
	b.interrupt(accepted)
	return nil, err
}

// dialing is how long a relay may take to dial the origin.
const dialing = 5 * time.Second

type accepting struct {
	conn net.Conn
	err  error
}

func (b *Dialed) accept(to chan<- accepting) {
	c, err := b.Origin.Accept()
	to <- accepting{c, err}
}

// interrupt ends an accept whose connection did not come, and closes one that came too late.
func (b *Dialed) interrupt(accepted <-chan accepting) {
	d, ok := b.Origin.(interface{ SetDeadline(time.Time) error })
	if !ok {
		b.Origin.Close()
	} else {
		d.SetDeadline(time.Now())
		defer d.SetDeadline(time.Time{})
	}
	if a := <-accepted; a.err == nil {
		a.conn.Close()
	}
}
