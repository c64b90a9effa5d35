package proxytest

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// InNetwork calls f on a thread that is in a network namespace of its own, which goes with it. f must not end its
// goroutine, as t.Fatal does. It needs root.
func InNetwork(t testing.TB, f func()) {
	t.Helper()
	NeedRoot(t)
	var all sync.WaitGroup
	all.Go(func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	})
	all.Wait()
}
