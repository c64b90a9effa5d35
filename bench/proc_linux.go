package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of the times in /proc/PID/stat: USER_HZ, which is 100 on every Linux that Go runs on.
const tick = 10 * time.Millisecond

// stat is what a line of /proc/PID/stat says about a process and the children it has waited for.
type stat struct {
	pid, parent int
	own         time.Duration // user and system time of the process
	reaped      time.Duration // and of the children it has waited for
}

// parseStat reads a line of /proc/PID/stat. The command's name, in parentheses, may contain anything.
func parseStat(line string) (stat, error) {
	var s stat
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 1 || end < open {
		return s, fmt.Errorf("proc: no command in stat line %.80q", line)
	}
	f := strings.Fields(line[end+1:]) // state, ppid, …; utime is field 14 of the line, 12 of these
	if len(f) < 15 {
		return s, fmt.Errorf("proc: stat line of %d fields: %.80q", len(f)+2, line)
	}
	var err error
	if s.pid, err = strconv.Atoi(strings.TrimSpace(line[:open])); err != nil {
		return s, fmt.Errorf("proc: pid: %w", err)
	}
	if s.parent, err = strconv.Atoi(f[1]); err != nil {
		return s, fmt.Errorf("proc: parent: %w", err)
	}
	for i, v := range f[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return s, fmt.Errorf("proc: time: %w", err)
		}
		if i < 2 {
			s.own += time.Duration(n) * tick
		} else {
			s.reaped += time.Duration(n) * tick
		}
	}
	return s, nil
}

// processes reads the stat of every process there is. Those that vanish meanwhile are left out.
func processes() []stat {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var all []stat
	for _, name := range names {
		if name[0] < '0' || name[0] > '9' {
			continue
		}
		b, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		if s, err := parseStat(string(b)); err == nil {
			s.own = max(s.own, cpuClock(s.pid))
			all = append(all, s)
		}
	}
	return all
}

// cpuClock returns the time that a process has used by its own clock: the sum in its stat line, but not cut to
// ticks, which over many short-lived processes would lose most of it. It is 0 for a process that has ended.
func cpuClock(pid int) time.Duration {
	var ts unix.Timespec
	const sched = 2 // CPUCLOCK_SCHED of a whole process, in the lowest bits of the clock's number
	if unix.ClockGettime(int32(^pid<<3|sched), &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// tree returns those of all that are one of roots or descend from one.
func tree(all []stat, roots ...int) []stat {
	in := make(map[int]bool, len(roots))
	for _, pid := range roots {
		in[pid] = true
	}
	for grown := true; grown; {
		grown = false
		for _, s := range all {
			if in[s.parent] && !in[s.pid] {
				in[s.pid], grown = true, true
			}
		}
	}
	var t []stat
	for _, s := range all {
		if in[s.pid] {
			t = append(t, s)
		}
	}
	return t
}

// cpu adds up the times of processes and of the children they have waited for.
func cpu(ps []stat) (d time.Duration) {
	for _, s := range ps {
		d += s.own + s.reaped
	}
	return d
}

// machineBusy returns the time that all cores together have been busy since boot: the first line of /proc/stat
// without idle and iowait.
func machineBusy() time.Duration {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	return parseBusy(line)
}

func parseBusy(line string) (d time.Duration) {
	f := strings.Fields(line)
	for i, v := range f {
		// cpu user nice system idle iowait irq softirq steal; guest times are part of user and nice
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, _ := strconv.ParseInt(v, 10, 64)
		d += time.Duration(n) * tick
	}
	return d
}

// footprint is what processes hold.
type footprint struct {
	rss, pss   float64 // KiB
	fds, pipes int     // pipes are counted once, not for each of their ends
}

// holds adds up what ps hold. Processes that vanish meanwhile are left out.
func holds(ps []stat) footprint {
	var f footprint
	pipes := make(map[string]bool)
	for _, s := range ps {
		rss, pss := memory(s.pid)
		f.rss += rss
		f.pss += pss
		dir := fmt.Sprintf("/proc/%d/fd", s.pid)
		fds, _ := os.ReadDir(dir)
		f.fds += len(fds)
		for _, fd := range fds {
			if to, _ := os.Readlink(dir + "/" + fd.Name()); strings.HasPrefix(to, "pipe:") {
				pipes[to] = true
			}
		}
	}
	f.pipes = len(pipes)
	return f
}

// memory returns the resident and the proportional set of pid in KiB. Where the proportional one
// cannot be read it is the resident one again.
func memory(pid int) (rss, pss float64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err == nil {
		rss, pss = parseKiB(b, "Rss:"), parseKiB(b, "Pss:")
	}
	if rss == 0 { // a kernel without the file, or one that does not let us read it
		b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		rss = parseKiB(b, "VmRSS:")
		pss = rss
	}
	return rss, pss
}

// parseKiB returns the number after key in a file of "Key:  123 kB" lines, and 0 where there is none.
func parseKiB(b []byte, key string) float64 {
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if rest, ok := strings.CutPrefix(sc.Text(), key); ok {
			n, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			return n
		}
	}
	return 0
}
