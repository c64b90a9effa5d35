package inbound

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/process"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

func fchmod(fd uintptr, mode os.FileMode) { unix.Fchmod(int(fd), uint32(mode.Perm())) }

// boundInode returns the inode of the socket that listens at a, or at all addresses at a's
// port; empty if there is none to be seen.
func boundInode(a proxy.Addr) string {
	const listening, unconnected = "0A", "07"
	files, state := []string{"/proc/net/tcp", "/proc/net/tcp6"}, listening
	if a.Network == "udp" {
		files, state = []string{"/proc/net/udp", "/proc/net/udp6"}, unconnected
	}
	for _, file := range files {
		var found string
		eachLine(file, func(f []string) bool {
			// sl local rem st queues timer retrnsmt uid timeout inode
			if len(f) < 10 || f[3] != state {
				return true
			}
			local, ok := procAddr(f[1])
			if !ok || local.Port() != a.Port {
				return true
			}
			ip := a.IP().Unmap()
			if ip.IsValid() && !ip.IsUnspecified() && !local.Addr().IsUnspecified() && local.Addr().Unmap() != ip {
				return true
			}
			found = f[9]
			return false
		})
		if found != "" {
			return found
		}
	}
	return ""
}

// procAddr reads an address as /proc/net/tcp has it: words of 32 bits in hex, as the machine has
// them, and the port.
func procAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	p, err := strconv.ParseUint(port, 16, 16)
	b, hexErr := hex.DecodeString(host)
	if !ok || err != nil || hexErr != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	ip, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip, uint16(p)), ok
}

// unixInode returns the inode of the socket that listens at path.
func unixInode(path string) string {
	var found string
	eachLine("/proc/net/unix", func(f []string) bool {
		// Num RefCount Protocol Flags Type St Inode Path; flag 00010000 is a listening one
		if len(f) == 8 && f[7] == path && f[3] == "00010000" {
			found = f[6]
		}
		return found == ""
	})
	return found
}

// eachLine calls do with the fields of each line until it returns false.
func eachLine(file string, do func(fields []string) bool) {
	f, err := os.Open(file)
	if err != nil {
		return
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan() && do(strings.Fields(sc.Text())); {
	}
}

// socketOwner returns a process that has the socket of that inode open: 0 if it cannot be found
// before the deadline, or belongs to a user whose processes we may not look into.
func socketOwner(inode string, deadline time.Time) (name string, pid int) {
	n, err := strconv.ParseUint(inode, 10, 64)
	if err != nil {
		return "", 0
	}
	if pid = process.Holder(n, deadline); pid == 0 {
		return "", 0
	}
	comm, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	return strings.TrimSpace(string(comm)), pid
}
