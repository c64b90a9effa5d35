package inbound

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drainPatience is how long a send queue may be without progress.
const drainPatience = 250 * time.Millisecond

// drain waits until the peer has got what was written to c, or gets no more of it: a reset that
// follows would discard it.
func drain(c net.Conn) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	least := -1
	for last := time.Now(); time.Since(last) < drainPatience; time.Sleep(time.Millisecond) {
		queued := 0
		raw.Control(func(fd uintptr) { queued, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err != nil || queued == 0 {
			return
		}
		if least < 0 || queued < least {
			least, last = queued, time.Now()
		}
	}
}
