//go:build !linux

package relaytest

import (
	"errors"
	"syscall"
	"time"
)

// Elsewhere sockets are seen only by reading and writing, so that [TCP] and the others have no
// Watch and no Urgent here, and scenarios that need them are left out.
const (
	socketCaps = HalfClose | Buffered
	tcpCaps    = socketCaps | Reset
)

func sockState(syscall.RawConn) (isErr, isHup bool) { return false, false }

// unsent has no portable form: what was sent 50 ms ago on a machine's own network has arrived.
func unsent(syscall.RawConn) (int, error) {
	time.Sleep(50 * time.Millisecond)
	return 0, nil
}

func sendUrgent(syscall.RawConn, []byte) error { return errors.ErrUnsupported }
func cpuTime() time.Duration                   { return 0 }
func descriptors() int                         { return -1 }

func setRepair(syscall.RawConn) error { return errors.ErrUnsupported }
func repairable() error               { return errors.ErrUnsupported }
