// Package process tells which process of this machine a client is.
//
// The kernel is asked for the one socket that has the client's addresses, which tells its user and takes some
// microseconds. It does not tell the process: that is found by looking through the open files of all processes,
// which takes some milliseconds where there are thousands of files. A process that was found is looked into
// first the next time, since most open more than one connection.
//
// Only Linux tells it, and only of processes that we may look into: those of other users need root. Clients in
// other network namespaces, in containers for example, and on other machines are not found. What a process says of
// itself is no proof of identity: who can run programs can run one under another name.
package process

import (
	"net/netip"
	"os"
	"sync"
	"time"
)

// Owner is the process that has a socket.
type Owner struct {
	UID    uint32 // the user that opened the socket
	PID    int    // 0 where it was not found or not asked for; so are the following
	Path   string // its program: "/usr/bin/curl"; for a script that of its interpreter
	Cgroup string // its control group, version 2: "/system.slice/cron.service"
}

// Table finds the owners of sockets, and knows them for a moment. The zero value is ready to use, by several
// goroutines at a time.
type Table struct {
	UserOnly bool // find no more than Owner.UID, which costs less

	mu     sync.Mutex
	known  map[uint64]finding // by the socket's inode: its addresses may be another's the next moment
	recent []int              // processes that were found, the last one first

	scan sync.Mutex // one at a time looks through all processes
}

type socket struct {
	client, peer netip.AddrPort
	network      string
}

type finding struct {
	owner Owner
	until time.Time
}

const (
	knowFor    = 2 * time.Second // a socket rarely goes to another process sooner
	knowMost   = 4096
	recentMost = 16
	scanFor    = time.Second // a machine with so many processes that it takes longer is not served
)

// Owner returns who has the socket whose own address is client and that is connected to peer. The network is "tcp"
// or "udp"; an unconnected UDP socket is found, too. It reports false where there is none on this machine. It may
// take some milliseconds.
func (t *Table) Owner(client, peer netip.AddrPort, network string) (Owner, bool) {
	if !client.IsValid() {
		return Owner{}, false
	}
	uid, inode, ok := socketOf(socket{unmapped(client), unmapped(peer), network})
	if !ok || t.UserOnly {
		return Owner{UID: uid}, ok
	}
	if o, ok := t.recall(inode); ok {
		return o, true
	}
	t.scan.Lock()
	defer t.scan.Unlock()
	if o, ok := t.recall(inode); ok { // another asked the same meanwhile
		return o, true
	}
	o := Owner{UID: uid}
	if o.PID = holder(inode, t.recent, time.Now().Add(scanFor)); o.PID != 0 {
		o.Path, o.Cgroup = describe(o.PID)
		t.recent = firstPID(t.recent, o.PID)
	}
	t.remember(inode, finding{o, time.Now().Add(knowFor)})
	return o, true
}

// firstPID returns recent with pid first.
func firstPID(recent []int, pid int) []int {
	all := append(make([]int, 0, recentMost), pid)
	for _, p := range recent {
		if p != pid && len(all) < recentMost {
			all = append(all, p)
		}
	}
	return all
}

func (t *Table) recall(inode uint64) (Owner, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, ok := t.known[inode]
	return f.owner, ok && time.Now().Before(f.until)
}

func (t *Table) remember(inode uint64, f finding) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.known) >= knowMost || t.known == nil {
		t.known = make(map[uint64]finding)
	}
	t.known[inode] = f
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// Holder returns a process that has the socket of that inode open: 0 if none can be found before the deadline, or
// it belongs to a user whose processes we may not look into. This process is looked into first, whatever the deadline.
func Holder(inode uint64, deadline time.Time) (pid int) {
	return holder(inode, []int{os.Getpid()}, deadline)
}
