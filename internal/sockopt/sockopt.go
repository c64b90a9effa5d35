// Package sockopt sets options of a socket between its creation and its use. Each option is a [Control], which is
// what [net.Dialer] and [net.ListenConfig] have a field for. A system that lacks an option says so
// with an error that is [errors.ErrUnsupported].
package sockopt

import (
	"fmt"
	"net"
	"syscall"
	"time"
)

// KeepAlive returns the keepalive settings of all TCP conns, those to clients and those to origins: a machine that
// vanished is noticed within a minute or so.
func KeepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second, Count: 3}
}

// Control sets an option of the socket c, which is for network and address.
type Control = func(network, address string, c syscall.RawConn) error

// Mark sets the mark that routing rules and packet filters of Linux know a socket's packets by (SO_MARK).
// It needs CAP_NET_ADMIN, else the error is [syscall.EPERM].
func Mark(mark int) Control {
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, fmt.Sprintf("set mark %d", mark), func(fd int) error { return setMark(fd, mark) })
	}
}

// Device makes the socket use one network interface only, whatever the routes say (SO_BINDTODEVICE).
// The error for an interface that does not exist is [syscall.ENODEV].
func Device(name string) Control {
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, "bind to interface "+name, func(fd int) error { return bindToDevice(fd, name) })
	}
}

// ReusePort lets other sockets that ask for the same listen at the same port, if they belong to the same user (SO_REUSEPORT).
// Linux, FreeBSD and DragonFly spread new clients over them; elsewhere one of them gets all.
func ReusePort(_, _ string, c syscall.RawConn) error {
	return control(c, "share the port", setReusePort)
}

// All sets each of the options in turn, up to the first that fails. It is nil for none.
func All(options ...Control) Control {
	if len(options) == 0 {
		return nil
	}
	return func(network, address string, c syscall.RawConn) error {
		for _, o := range options {
			if err := o(network, address, c); err != nil {
				return err
			}
		}
		return nil
	}
}

func control(c syscall.RawConn, what string, set func(fd int) error) error {
	var setErr error
	if err := c.Control(func(fd uintptr) { setErr = set(int(fd)) }); err != nil {
		return fmt.Errorf("sockopt: %s: %w", what, err)
	}
	if setErr != nil {
		return fmt.Errorf("sockopt: %s: %w", what, setErr)
	}
	return nil
}
