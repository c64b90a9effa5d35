package process

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Supported says whether this system tells the owners of sockets.
const Supported = true

// The messages of sock_diag(7). A request for one socket is a header, these fields of inet_diag_req_v2 and its
// inet_diag_sockid; the answer is inet_diag_msg. There is a library for it, but that asks for a dump of the whole table.
const (
	requestLen  = unix.SizeofNlMsghdr + 8 + sockIDLen
	sockIDLen   = 48
	answerUID   = 4 + sockIDLen + 12
	answerInode = answerUID + 4
	answerLen   = answerInode + 4
	stateListen = 10
	diagByAF    = 20 // SOCK_DIAG_BY_FAMILY
)

// socketOf asks the kernel for a socket by its addresses.
func socketOf(s socket) (uid uint32, inode uint64, ok bool) {
	req := request(s)
	if req == nil {
		return 0, 0, false
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, 0, false
	}
	defer unix.Close(fd)
	// The kernel answers before Sendto returns, so Recvfrom does not wait.
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, 0, false
	}
	var buf [4096]byte
	n, _, err := unix.Recvfrom(fd, buf[:], unix.MSG_DONTWAIT)
	if err != nil {
		return 0, 0, false
	}
	return readAnswer(buf[:n])
}

// request returns the message that asks for s, or nil if s cannot be.
func request(s socket) []byte {
	own, peer := s.client, s.peer
	if own.Addr().Is4() != peer.Addr().Is4() || !peer.IsValid() {
		return nil
	}
	protocol, family := byte(unix.IPPROTO_TCP), byte(unix.AF_INET6)
	if s.network == "udp" {
		protocol = unix.IPPROTO_UDP
		own, peer = peer, own // the kernel has it the other way round for UDP, for historical reasons
	}
	if own.Addr().Is4() {
		family = unix.AF_INET
	}
	ne, be := binary.NativeEndian, binary.BigEndian
	b := make([]byte, requestLen)
	ne.PutUint32(b, requestLen)
	ne.PutUint16(b[4:], diagByAF)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	body := b[unix.SizeofNlMsghdr:]
	body[0], body[1] = family, protocol
	ne.PutUint32(body[4:], 0xffffffff) // any state
	id := body[8:]
	be.PutUint16(id, own.Port())
	be.PutUint16(id[2:], peer.Port())
	copy(id[4:20], own.Addr().AsSlice())
	copy(id[20:36], peer.Addr().AsSlice())
	ne.PutUint64(id[40:], ^uint64(0)) // no cookie
	return b
}

// readAnswer reads the kernel's answer.
func readAnswer(b []byte) (uid uint32, inode uint64, ok bool) {
	ne := binary.NativeEndian
	if len(b) < unix.SizeofNlMsghdr+answerLen || ne.Uint16(b[4:]) != diagByAF {
		return 0, 0, false
	}
	m := b[unix.SizeofNlMsghdr:]
	uid, inode = ne.Uint32(m[answerUID:]), uint64(ne.Uint32(m[answerInode:]))
	// A listener is found where the connection is gone, and a socket that is closed has no inode.
	return uid, inode, m[1] != stateListen && inode != 0
}

// holder finds a process that has the socket open, those that are first before the others.
func holder(inode uint64, first []int, deadline time.Time) (pid int) {
	if inode == 0 {
		return 0
	}
	want := fmt.Appendf(nil, "socket:[%d]", inode)
	for _, pid := range first {
		if holds(pid, want) {
			return pid
		}
	}
	self := os.Getpid()
	for _, pid := range pids() {
		if time.Now().After(deadline) {
			return 0
		}
		if pid != self && holds(pid, want) {
			return pid
		}
	}
	if holds(self, want) { // last, since a proxy has many files open, and is rarely its own client
		return self
	}
	return 0
}

// pids returns all processes, the highest number first: a client is often younger than most.
func pids() []int {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	all := make([]int, 0, len(names))
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			all = append(all, pid)
		}
	}
	slices.Sort(all)
	slices.Reverse(all)
	return all
}

// holds says whether the process has a descriptor whose link reads want.
func holds(pid int, want []byte) bool {
	dir, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return false
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	var to [64]byte
	for _, n := range names {
		if l, err := unix.Readlinkat(int(dir.Fd()), n, to[:]); err == nil && bytes.Equal(to[:l], want) {
			return true
		}
	}
	return false
}

// describe returns what is known of a process; empty where it is gone.
func describe(pid int) (path, cgroup string) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	path, _ = os.Readlink(filepath.Join(dir, "exe"))
	path = strings.TrimSuffix(path, " (deleted)") // replaced by an update
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
	for line := range strings.Lines(string(b)) {
		if c, ok := strings.CutPrefix(line, "0::"); ok { // version 2: cgroups(7)
			cgroup = strings.TrimSuffix(c, "\n")
		}
	}
	return path, cgroup
}
