//go:build darwin || dragonfly || linux || netbsd || openbsd

package sockopt

import "golang.org/x/sys/unix"

const reusePort = unix.SO_REUSEPORT
