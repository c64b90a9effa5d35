package relaytest

import (
	"errors"
	"io"
	"syscall"
	"time"
)

// Event is one thing that an end of a connection did or saw.
type Event struct {
	At     time.Duration // since the scenario began: of Sent, when it began to send. They are not told in this order
	Conn   int           // the connection, from 0
	Origin bool          // it is the origin's; else the client's
	Kind   Kind
	Bytes  int    // of Sent and Received
	Note   string // more of it, such as the text of an error; often empty
}

// End returns "client" or "origin".
func (e Event) End() string {
	if e.Origin {
		return "origin"
	}
	return "client"
}

// Kind says what an end did or saw.
type Kind uint8

// What an end does, and then what it sees.
const (
	Opened Kind = iota
	Sent
	HalfClosed
	Closed
	WasReset // by itself
	Vanished
	Received
	SawEnd     // a clean end of the stream
	SawReset   // an error of the connection
	SawNothing // in the time that it waited
)

// String returns it as a verb: "sends", "sees a reset".
func (k Kind) String() string {
	return [...]string{"opens", "sends", "half-closes", "closes", "resets", "vanishes",
		"gets", "sees the end", "sees a reset", "sees nothing"}[min(k, SawNothing)]
}

// Seen says whether it is something that an end sees, not what it does.
func (k Kind) Seen() bool { return k >= Received }

func (e *end) event(k Kind, bytes int, note string) { e.eventAt(time.Now(), k, bytes, note) }

func (e *end) eventAt(at time.Time, k Kind, bytes int, note string) {
	if e.t.Trace == nil || e.gone.Load() {
		return
	}
	e.t.Trace(Event{
		At: at.Sub(e.t.start), Conn: e.number, Origin: e.name == "origin", Kind: k, Bytes: bytes, Note: note,
	})
}

// left is the event of an end that leaves; nothing that follows counts.
func (e *end) left(k Kind) {
	e.event(k, 0, "")
	e.gone.Store(true)
}

func (e *end) saw(n int, err error) {
	if n > 0 {
		e.event(Received, n, "")
	}
	switch {
	case err == nil:
	case err == io.EOF:
		e.event(SawEnd, 0, "")
	case isTimeout(err):
		e.event(SawNothing, 0, "")
	default:
		e.event(SawReset, 0, plain(err))
	}
}

func (e *end) wrote(begun time.Time, n int, err error) {
	if n > 0 {
		e.eventAt(begun, Sent, n, "")
	}
	if err != nil && !isTimeout(err) {
		e.event(SawReset, 0, plain(err))
	}
}

// plain leaves the addresses out of an error.
func plain(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}
