// Package rtnetlink lists what the kernel's routing consists of: its rules, routes and addresses.
//
// The kernel hands out a long list in parts. Where somebody changes the list between two of them (a routing daemon, a VPN,
// the start of a container), parts of it may be missing, and it says so: such a list must not be taken for all there is, as
// who cleans up by it would leave something behind, and it is no reason to give up. [List] asks again.
package rtnetlink

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	tries = 50
	pause = 2 * time.Millisecond // between two
)

// List returns what list returns, once nothing has changed meanwhile. Where something does each time, it gives up after
// a tenth of a second or a little more, with [netlink.ErrDumpInterrupted].
func List[T any](list func() ([]T, error)) (all []T, err error) {
	for range tries {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
		time.Sleep(pause)
	}
	return nil, err
}
