//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

import "golang.org/x/sys/unix"

func setReusePort(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, reusePort, 1) }
