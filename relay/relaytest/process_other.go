//go:build !linux

package relaytest

import (
	"errors"
	"time"
)

// Processes returns the Meter of a relay that runs as these processes and their descendants. There
// is one for Linux only: elsewhere its methods return an error.
func Processes(pids ...int) Meter { return processes(pids) }

type processes []int

func (processes) CPU() (time.Duration, error) { return 0, errors.ErrUnsupported }
func (processes) Held() (int, int, error)     { return -1, -1, errors.ErrUnsupported }
