package main

import "golang.org/x/sys/unix"

// hideInput has the terminal show nothing of what is typed.
func hideInput(fd int) {
	if t, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		t.Lflag &^= unix.ECHO
		unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
}
