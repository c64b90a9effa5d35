//go:build !linux

package relay

import (
	"io"
	"syscall"
)

const canTryRead = false

// socket: other systems than Linux tell neither of send queues nor of errors that nobody asked for.
type socket struct {
	raw syscall.RawConn
}

func newSocket(c syscall.Conn, tcp bool) socket { return socket{} }

func (s socket) unsent() (n int, ok bool)             { return 0, false }
func (s socket) dead() bool                           { return false }
func (s socket) failure() error                       { return errReset }
func (s socket) watch(failed func()) (unwatch func()) { return func() {} }

func (rd *reader) tryRead(fd uintptr) bool { panic("relay: not reached") }

func startKernel(r *Relay, st *Stats, a, b io.ReadWriteCloser, heads [2][]byte, done func(Result)) (*Pair, bool) {
	return nil, false
}
