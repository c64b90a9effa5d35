// Package relay joins two streams so that neither end can tell the relay from a direct connection.
//
// Two calls of [io.Copy] look as if they did that. They do not say what happens at the end, and
// the end is where bytes are lost: a client that half-closes (sends its request, then FIN) must
// still get its reply; a download that the origin aborted must not look complete; a peer that
// vanished must be noticed although nobody writes to it; and a conn that is idle should cost
// nothing. [Join] keeps these rules for any pair of streams:
//
//   - An end of stream is passed on as a half-close, at once, and the other direction goes on for
//     as long as bytes move.
//   - A reset is passed on as a reset, after all that was read before it has been delivered.
//   - When one side can take no more bytes, its last words are still delivered to the other, which
//     is then reset, because bytes of its own were lost.
//   - Limits are limits on silence: [Relay.Idle] while both directions are open, [Relay.HalfOpen]
//     after one has ended. Bytes that wait for a slow reader are not silence.
//   - What a direction holds is bounded, and a reader that stalls stalls its own direction only.
//
// # Joining
//
//	ln, err := net.Listen("tcp", "127.0.0.1:8080")
//	...
//	for {
//		client, err := ln.Accept()
//		...
//		go func() {
//			ctx, stop := relay.ResetContext(ctx, client) // a client that gives up cancels the dial
//			origin, err := dialer.DialContext(ctx, "tcp", "example.com:80")
//			stop()
//			if err != nil {
//				relay.Abort(client) // refuse as a refused connection looks
//				return
//			}
//			res := relay.Join(context.Background(), client, origin)
//			log.Print(res)
//		}()
//	}
//
// Join owns both conns from the call on, and closes them. What else a conn can do is found by
// optional interfaces: [HalfCloser], [Aborter], [Transparent], deadlines and [syscall.Conn].
//
// A conn that is neither TCP, nor TLS over it, nor an Aborter has no reset: where it should be reset it
// is closed, and its peer may take that for a clean end. So it is with [net.Pipe], Unix sockets and the
// channels of golang.org/x/crypto/ssh.
//
// # Errors
//
// [Result.Err] is nil or wraps what broke the pair: the error of a conn's Read or Write (ECONNRESET, or ETIMEDOUT for a
// peer that has vanished), [ErrIdle], [ErrHalfOpen], [ErrQuota], [ErrPanic], or the cause of the
// cancelled context. [errors.Is] tells them apart under both engines; [Direction.End] says it without the error.
//
// # Counting
//
// Do not wrap a conn to count its bytes: a wrapped conn hides what it can do, and the relay can
// only copy. Give Join a [Stats] and read it while bytes move.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// The default limits.
const (
	// DefaultIdle is what RFC 5382 section 5 asks of a NAT for an established connection.
	DefaultIdle = 2*time.Hour + 4*time.Minute
	// DefaultHalfOpen is what RFC 5382 section 5 asks for a connection that is partly closed.
	DefaultHalfOpen = 4 * time.Minute
)

// settle is how long a pair that is ending may go without progress: the last words of a side that
// takes no more bytes, and the send queue of a side about to be reset.
const settle = 250 * time.Millisecond

// Errors that a Result or one of its directions may wrap.
var (
	// ErrIdle: no byte moved either way for [Relay.Idle].
	ErrIdle = errors.New("relay: idle limit reached")
	// ErrHalfOpen: one direction had ended, and no byte moved in the other for [Relay.HalfOpen].
	ErrHalfOpen = errors.New("relay: half-open limit reached")
	// ErrQuota: the bytes of [Relay.Quota] have been passed on.
	ErrQuota = errors.New("relay: quota used up")
	// ErrNoHalfClose: an end of stream could not be passed on because the conn cannot half-close.
	ErrNoHalfClose = errors.New("relay: conn cannot half-close")
	// ErrPanic: a method of a conn panicked. The error's text says with what.
	ErrPanic = errors.New("relay: conn panicked")
)

// Relay holds the settings of a relay. The zero value is ready to use. A Relay may be used by many
// joins at a time and must not be changed while one runs.
type Relay struct {
	// Idle is how long neither direction may move a byte while both are open; then both conns are
	// aborted. Zero is DefaultIdle, negative is no limit.
	Idle time.Duration

	// HalfOpen is how long no byte may move after one direction has ended; then both conns are
	// aborted. Zero is DefaultHalfOpen, negative is no limit of its own. A half-closed pair is
	// never given more time than Idle gives an open one.
	HalfOpen time.Duration

	// PacketIdle is how long no datagram may come from either side of JoinPackets; then both are closed. Zero is
	// DefaultPacketIdle, and DefaultDNSIdle while all datagrams go to port 53; negative is no limit.
	PacketIdle time.Duration

	// Grace is how long a join may go on after its context is cancelled; then, or at once for
	// zero, both conns are aborted.
	Grace time.Duration

	// Rate is how many bytes a second each direction may pass on; zero is no limit. It is kept by
	// reading less, so that the sender is slowed down by TCP itself, and costs no copy. What it holds
	// back is not silence: no limit on time runs meanwhile.
	Rate int64

	// Shared is a limit that this relay shares with all others that have it, both directions of
	// each added up. Nil is none.
	Shared *Limiter

	// Quota is how many bytes each join may pass on, both directions added up. A byte that comes
	// beyond it is not passed on, and both conns are aborted. Zero is no limit. A quota that many joins
	// have in common is the caller's to keep: by their Stats, and Pair.Abort or the context.
	Quota int64

	// BusyPoll is how long the loop that carries the relay goes on asking for events, after it
	// has had some, before it sleeps. It shortens the way of a message by the time that waking up takes,
	// and costs that much processor time after every pause. Zero is none, which is best but
	// for a machine with processors to spare. 50 µs is a good value; it is cut to 1 ms. The loop
	// keeps the largest value of the relays it has had. It is of no effect under the portable engine.
	BusyPoll time.Duration

	// Portable keeps joins out of the kernel-assisted engine of the platform. They behave the same
	// and cost more.
	Portable bool
}

// Join is [Relay.Join] with the default settings and no Stats.
func Join(ctx context.Context, a, b io.ReadWriteCloser) Result {
	return new(Relay).Join(ctx, a, b, nil)
}

// Side names an end of a relay, by the order of Join's arguments.
type Side uint8

// The sides.
const (
	A Side = iota
	B
	Neither // only in a Result whose end came from outside: a limit, a cancelled context
)

func (s Side) other() Side { return s ^ 1 }

// String returns "a", "b", or "none".
func (s Side) String() string { return [...]string{"a", "b", "none"}[min(s, Neither)] }

// End says how a direction ended.
type End uint8

// The ends of a direction from S to D.
const (
	EOF      End = iota // S ended cleanly, all its bytes and its end were passed on to D
	Read                // reading from S failed: S was reset, or vanished
	Write               // writing to D failed, or D was known to be broken: bytes of S were lost
	Idle                // the idle limit
	HalfOpen            // the half-open limit
	Canceled            // the context, or Pair.Abort
	Quota               // the quota
)

// String returns the end's name as it stands in logs: eof, read, write, idle, half-open, cancel, quota.
func (e End) String() string {
	return [...]string{"eof", "read", "write", "idle", "half-open", "cancel", "quota"}[min(e, Quota)]
}

// Direction says what became of one direction.
type Direction struct {
	Bytes int64 // bytes that the destination's Write (the kernel, for a socket) has taken
	End   End
	Err   error // nil for EOF; EOF with ErrNoHalfClose where the end could only be passed on by closing
}

// Result says what became of a joined pair.
type Result struct {
	AToB, BToA Direction
	First      Side          // the side that ended the relay's first direction, by its end or by failing
	Duration   time.Duration // from the call to the close of both conns
}

// Err returns nil if both directions ended cleanly, and otherwise the error that broke the pair.
func (r Result) Err() error {
	first, second := r.AToB, r.BToA
	if r.First == B {
		first, second = second, first
	}
	for _, d := range [...]Direction{first, second} {
		if d.End == Read { // the cause, where the other direction's Write is its effect
			return d.Err
		}
	}
	for _, d := range [...]Direction{first, second} {
		if d.End != EOF {
			return d.Err
		}
	}
	return nil
}

// String returns one line for a log.
func (r Result) String() string {
	return fmt.Sprintf("a→b %d bytes %v, b→a %d bytes %v, first %v, %v",
		r.AToB.Bytes, r.AToB.End, r.BToA.Bytes, r.BToA.End, r.First, r.Duration.Round(time.Microsecond))
}

// Engine names the way in which a pair is carried.
type Engine uint8

// The engines.
const (
	None   Engine = iota // not started
	Copy                 // goroutines that read and write: any conn
	Kernel               // an event loop over the sockets' descriptors, with splice(2) for bulk: Linux
)

// String returns "none", "copy" or "kernel".
func (e Engine) String() string { return [...]string{"none", "copy", "kernel"}[min(e, Kernel)] }

// Stats counts while a pair is joined. The zero value is ready; it belongs to the caller, serves one
// join, and may be read at any time from any goroutine.
type Stats struct {
	moved [2]atomic.Int64
	mode  atomic.Uint32 // the Engine, and splicing bits above it
}

// splicing is the bit of Stats.mode for way 0; that of the other is the next.
const splicing = 1 << 8

// Bytes returns the bytes passed on so far in each direction.
func (s *Stats) Bytes() (aToB, bToA int64) { return s.moved[A].Load(), s.moved[B].Load() }

// Engine returns the engine that carries the pair.
func (s *Stats) Engine() Engine { return Engine(s.mode.Load() % splicing) }

// Splicing says for each direction whether it currently moves by splice(2), not by copying.
func (s *Stats) Splicing() (aToB, bToA bool) {
	m := s.mode.Load()
	return m&splicing != 0, m&(splicing<<1) != 0
}

func (s *Stats) setEngine(e Engine) { s.mode.Store(uint32(e)) }

func (s *Stats) setSplicing(way Side, on bool) {
	if on {
		s.mode.Or(splicing << way)
	} else {
		s.mode.And(^uint32(splicing << way))
	}
}
