//go:build !linux

package relaytest

import (
	"errors"
	"net"
)

func setBacklog(*net.TCPListener, int) error { return errors.ErrUnsupported }
func refuse(*net.TCPListener) error          { return errors.ErrUnsupported }

// absences says why origins cannot be made absent here.
func absences() string { return "a listener can be made to ignore connections on Linux only" }
