//go:build !linux

package relay

import (
	"io"
	"syscall"
)

const canTryRead = false

// below: other systems than Linux tell neither of send queues nor of errors that nobody asked for.
type below struct {
	raw syscall.RawConn
}

func newBelow(c syscall.Conn, tcp bool) below { return below{} }

func (s below) unsent() (n int, ok bool)             { return 0, false }
func (s below) dead() bool                           { return false }
func (s below) failure() error                       { return errReset }
func (s below) watch(failed func()) (unwatch func()) { return func() {} }

func (rd *reader) tryRead(fd uintptr) bool { panic("relay: not reached") }

func startKernel(r *Relay, st *Stats, a, b io.ReadWriteCloser, heads [2][]byte, done func(Result)) (*Pair, bool) {
	return nil, false
}
