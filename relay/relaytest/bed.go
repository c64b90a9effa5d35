package relaytest

import (
	"context"
	"io"
	"net"
	"runtime"
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
