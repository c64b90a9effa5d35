package outbound

import (
	"errors"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// fault says where a dial failed, where that is known: on the way to the first or only hop, or behind the last. It
// does not change what the error says. In a chain each hop is behind the one before, so the outermost fault counts.
type fault struct {
	error
	behind bool // the hop has answered, and what it says is about the destination
}

// Unwrap returns the error.
func (f *fault) Unwrap() error { return f.error }

// ofHop marks err as one of the way to a hop.
func ofHop(err error) error { return &fault{err, false} }

// ofOrigin marks err as what a hop, or this machine, says of a destination.
func ofOrigin(err error) error { return &fault{err, true} }

// verdict is what the outcome of a dial says of the way out that it took.
type verdict uint8

const (
	final     verdict = iota // it has done its part: success, or an answer about the destination that would be the same elsewhere
	elsewhere                // it has done its part, but cannot get there from where it is; another may
	unable                   // it does not do such things; nothing was tried
	doubtful                 // there was no answer: for its own reasons, or the destination's
	broken                   // it cannot be reached, or is not what it should be
)

// packetVerdictOf is verdictOf for datagrams. One that refuses them may be good for streams, so no more counts against it
// than that it cannot be reached.
func packetVerdictOf(err error) verdict {
	if f, known := errors.AsType[*fault](err); err == nil || known && !f.behind {
		return verdictOf(err)
	}
	return unable
}

func verdictOf(err error) verdict {
	reason := proxy.ReasonOf(err)
	f, known := errors.AsType[*fault](err)
	switch {
	case err == nil:
		return final
	case known && !f.behind:
		return broken
	case known:
		switch reason {
		case proxy.NetUnreachable, proxy.HostUnreachable, proxy.Timeout, proxy.Other:
			return elsewhere
		}
		return final
	case reason == proxy.Unsupported:
		return unable
	case reason == proxy.Timeout || reason == proxy.Reset:
		return doubtful
	}
	return broken
}
