package e2e

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inNamespace runs f, whose sockets are made in the network namespace that is bound to the file called name.
func inNamespace(name string, f func() error) error {
	runtime.LockOSThread()
	old, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer old.Close()
	there, err := os.Open(name)
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	err = f()
	if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread() // else the thread ends with its goroutine
	}
	return err
}
