package route

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/internal/process"
)

// Ports is a range of ports, both ends included.
type Ports struct{ First, Last uint16 }

// ParsePorts reads a port, or a range of them as in 8000-8999.
func ParsePorts(s string) (Ports, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
	b, errB := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
	switch {
	case errA != nil || errB != nil || a == 0 || b == 0:
		return Ports{}, fmt.Errorf("%q is neither a port nor a range of ports (as in 443 or 8000-8999)", s)
	case a > b:
		return Ports{}, fmt.Errorf("%q ends before it begins", s)
	}
	return Ports{uint16(a), uint16(b)}, nil
}

func containsPort(list []Ports, port uint16) bool {
	for _, p := range list {
		if p.First <= port && port <= p.Last {
			return true
		}
	}
	return false
}

// Processes are the processes that have one thing in common: their program or its name, their user, or their control
// group. Exactly one of the fields is set.
type Processes struct {
	Name   string  // "curl"
	Path   string  // "/usr/bin/curl"
	Cgroup string  // "/system.slice/cron.service", and what is below it
	UID    *uint32 // the user
}

// ParseProcesses reads a program's name or path, uid:NUMBER or cgroup:/PATH.
func ParseProcesses(s string) (Processes, error) {
	kind, value, prefixed := strings.Cut(s, ":")
	switch {
	case strings.HasPrefix(s, "/") && len(s) > 1:
		return Processes{Path: s}, nil
	case prefixed && kind == "uid":
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return Processes{}, fmt.Errorf("%q: a user is a number here (as in uid:1000)", s)
		}
		uid := uint32(n)
		return Processes{UID: &uid}, nil
	case prefixed && kind == "cgroup":
		path := strings.TrimRight(value, "/")
		if !strings.HasPrefix(path, "/") {
			return Processes{}, fmt.Errorf("%q: a control group is a path below its root "+
				"(as in cgroup:/system.slice/cron.service)", s)
		}
		return Processes{Cgroup: path}, nil
	case s == "" || prefixed || strings.ContainsRune(s, '/'):
		return Processes{}, fmt.Errorf("%q is neither a program's name or path, nor uid:NUMBER, nor cgroup:/PATH", s)
	}
	return Processes{Name: s}, nil
}

// NeedsPID says whether the socket's user is not enough to know whether a process is among p.
func (p Processes) NeedsPID() bool { return p.UID == nil }

// Contains says whether the process is among p.
func (p Processes) Contains(o *process.Owner) bool {
	switch {
	case p.UID != nil:
		return *p.UID == o.UID
	case p.Path != "":
		return p.Path == o.Path
	case p.Name != "":
		return p.Name == o.Path[strings.LastIndexByte(o.Path, '/')+1:]
	case p.Cgroup != "":
		return below(o.Cgroup, p.Cgroup)
	}
	return false
}

// below says whether path is dir or below it.
func below(path, dir string) bool {
	return strings.HasPrefix(path, dir) && (len(path) == len(dir) || path[len(dir)] == '/')
}
