// Package enclosure runs a command in a network of its own, whose only way out is a TUN device that the caller
// holds the other end of. No rights are needed for it, on a Linux that lets users make user namespaces.
//
// Three parties take part. The caller, outside, is in the network that everybody is in. It starts a copy of its
// own program in new namespaces, the inside, where that is the master: there it makes the device, sends it
// out over a socket, sets addresses, routes and the files that say how names are resolved, and then becomes the
// command, with the rights of the user and none of those that it had for a moment. The command sees the user's files, terminal,
// environment and processes; only its network is another.
//
//	p, err := enclosure.Start(path, args, network)   // nothing of the command has run yet
//	…                                                // serve p.Device
//	err = p.Release()                                // now it runs
//	status, err := p.Wait()
//
// The program's main function calls [Inside] when it is started with the argument [InsideName].
//
// An enclosure is no prison. It keeps a program that does not know of it from bypassing the device, by whatever sockets
// it uses; it does not keep out one that asks a service outside, through a Unix socket in the file system, to do its work.
package enclosure

import (
	"fmt"
	"net/netip"
)

// InsideName is the first argument of the program when Start has started it. The others are for Inside.
const InsideName = "enclosed"

// Network is what the command is to see as its network.
type Network struct {
	Addrs      []netip.Prefix // of the device, IPv4 and IPv6; there is a default route for each family. No IPv6 where the kernel has none
	Nameserver netip.Addr     // what is asked for names, through the device; the zero Addr: as outside
	MTU        int            // 0: as tundev chooses
}

// CommandError says that the command could not be executed.
type CommandError struct {
	Name string
	Err  error
}

// Error returns the name and the cause.
func (e *CommandError) Error() string { return fmt.Sprintf("%s: %v", e.Name, e.Err) }

// Unwrap returns the cause.
func (e *CommandError) Unwrap() error { return e.Err }
