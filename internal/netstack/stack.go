// Package netstack is an inbound for whole IP packets: it answers as every host in the world would.
//
// A [Stack] reads the packets of a TUN device and runs the TCP, UDP and ICMP of all their destinations in user space, on
// gVisor's TCP/IP. A SYN becomes a pending stream, which is answered when the destination was dialled and as the
// dial ended: by a SYN-ACK, a RST, an ICMP message, or silence. The datagrams of one source become one session,
// whatever their destinations.
//
// Packets are up to 64 KiB both ways, however small the device's MTU: the kernel cuts and joins them. See package tundev.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Stack is an inbound that takes the streams and datagrams out of a device's packets. Set its fields before Listen.
type Stack struct {
	Name string // for flows and logs

	// Open returns the device; Listen calls it, and the Stack closes the device. It should be up.
	Open func(ctx context.Context) (*tundev.Device, error)

	// MaxPending is how many streams' dials go on at a time; further SYNs are dropped. One client (in IPv6 one network of 64
	// bits) may have as many of them as are left: half of all, where it is alone. 0: DefaultMaxPending.
	MaxPending int
	// MaxSessions is how many sources of datagrams there are at a time; datagrams of further ones are dropped, and one that nobody
	// has answered yet makes room. 0: DefaultMaxSessions.
	MaxSessions int

	// Ping asks dst for an answer to an ICMP echo with this payload, and returns nil once it is there. An echo
	// request from the device is answered when Ping returns nil, and not at all otherwise. Nil: none is answered.
	Ping func(ctx context.Context, dst netip.Addr, payload []byte) error

	Log *slog.Logger // nil: silent

	r *running // nil before Listen
}

// The defaults of a Stack's budgets.
const (
	DefaultMaxPending  = 4096
	DefaultMaxSessions = 4096
)

var _ proxy.Inbound = (*Stack)(nil)

// running is what a Stack is once it listens.
type running struct {
	settings *Stack
	log      *slog.Logger
	link     *link
	stack    *stack.Stack
	tcp      streams
	udp      datagrams
	echo     echoes

	ctx     context.Context // of Serve: sessions end with it
	cancel  context.CancelCauseFunc
	handler proxy.Handler

	packetID atomic.Uint32 // of the last packet of IPv4 that was made here
	sessions sync.WaitGroup
	lines    sync.WaitGroup // that are being logged
	waiting  atomic.Int32   // how many of them

	mu      sync.Mutex
	refuses bool // no new sessions
	closed  chan struct{}
}

// Listen implements proxy.Inbound: it opens the device.
func (s *Stack) Listen(ctx context.Context) error {
	if s.r != nil {
		return errors.New("netstack: Listen was called twice")
	}
	if s.Open == nil {
		return errors.New("netstack: no device to open")
	}
	dev, err := s.Open(ctx)
	if err != nil {
		return err
	}
	if err := s.listenOn(dev); err != nil {
		dev.Close()
		return err
	}
	return nil
}

// listenOn makes the stack on a device.
func (s *Stack) listenOn(dev device) error {
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &running{settings: s, log: log.With("inbound", s.Name), link: newLink(dev), closed: make(chan struct{})}
	r.tcp.init(r, s.MaxPending)
	r.udp.init(r, s.MaxSessions)
	r.echo.init(r)
	if err := r.newStack(); err != nil {
		return err
	}
	s.r = r
	return nil
}

// Device returns the device that Listen opened; nil before.
func (s *Stack) Device() *tundev.Device {
	if s.r == nil {
		return nil
	}
	d, _ := s.r.link.dev.(*tundev.Device)
	return d
}

// Close implements proxy.Inbound. New streams and sources of datagrams are not taken any more; those there are go on. The device is
// closed when Serve returns; before Serve, at once.
func (s *Stack) Close() error {
	r := s.r
	if r == nil {
		return nil
	}
	r.mu.Lock()
	first, serving := !r.refuses, r.handler != nil
	r.refuses = true
	if first {
		close(r.closed)
	}
	r.mu.Unlock()
	if first && !serving {
		r.tearDown()
	}
	return nil
}

// Serve implements proxy.Inbound. It returns an error that wraps [tundev.ErrGone] when the device was deleted.
func (s *Stack) Serve(ctx context.Context, h proxy.Handler) error {
	r := s.r
	if r == nil {
		return errors.New("netstack: Serve was called before Listen")
	}
	r.mu.Lock()
	if r.refuses {
		r.mu.Unlock()
		return nil
	}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	r.handler = h
	r.mu.Unlock()
	defer r.cancel(nil)

	go r.link.answers.run()
	defer r.link.answers.end()
	reading := make(chan error, 1)
	go r.read(reading)
	var err error
	select {
	case err = <-reading: // the device is gone
		s.Close()
		r.cancel(err)
	case <-ctx.Done():
		s.Close()
	case <-r.closed:
	}
	finished := make(chan struct{})
	go r.finish(finished)
	if err == nil {
		select {
		case <-finished:
		case err = <-reading: // the device is gone, and with it what its sessions could wait for
			r.cancel(err)
		}
	}
	<-finished
	if err == nil {
		r.linger()
		r.link.dev.Close()
		<-reading
	}
	r.tearDown()
	r.lines.Wait()
	return err
}

// linesMax bounds the lines that wait for a log that does not take them; further ones are dropped.
const linesMax = 16

// warn logs without waiting for the log, which may block: the reader of the device must not.
func (r *running) warn(message string, args ...any) {
	if r.waiting.Add(1) > linesMax {
		r.waiting.Add(-1)
		return
	}
	r.lines.Go(func() {
		defer r.waiting.Add(-1)
		r.log.Warn(message, args...)
	})
}

// read passes the device's packets to the stack until the device is closed.
func (r *running) read(done chan<- error) {
	err := r.link.read()
	if r.isClosing(err) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("netstack: %w", err)
	}
	done <- err
}

// finish waits for the sessions.
func (r *running) finish(done chan<- struct{}) {
	r.sessions.Wait()
	close(done)
}

// begins takes a session, unless the stack takes none any more. The caller calls r.sessions.Done once for it.
func (r *running) begins() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refuses || r.handler == nil {
		return false
	}
	r.sessions.Add(1)
	return true
}

// lingerMax is how long Serve waits, after its last session, for peers to take what was sent to them.
const lingerMax = 3 * time.Second

// linger waits until the peers have the last bytes and the ends of the streams that are over.
func (r *running) linger() {
	for deadline := time.Now().Add(lingerMax); r.ctx.Err() == nil && time.Now().Before(deadline); {
		if !r.unfinished() {
			return
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-r.ctx.Done():
		}
	}
}

func (r *running) tearDown() {
	r.link.dev.Close()
	r.stack.Destroy()
}
