package main

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// relaysPerProcess is how many relays a process of a relay holds at most, where it may open 20 000 files.
const relaysPerProcess = 9500

// perRelayMemory is what a relay takes of the machine at most, both ends and the kernel included: a run begins only where there is
// as much.
const perRelayMemory = 64 << 10

// sampled is how many relays are asked one at a time.
const sampled = 1000

// scaleProcesses returns how many processes n relays need. The kernel gives clients to them by a hash, so that where
// there are several, none is planned to be full.
func scaleProcesses(n, fds int) int {
	most := max(1, min(relaysPerProcess, (fds-1000)/2))
	if n <= most {
		return 1
	}
	most -= most / 20
	return (n + most - 1) / most
}

// each returns a start of one process for each origin, all of which listen at the same port.
func each(start func(k *kit, dir, listen, origin string) ([]*process, error)) func(*kit, string, string, []string) ([]*process, error) {
	return func(k *kit, dir, listen string, origins []string) ([]*process, error) {
		var all []*process
		for i, origin := range origins {
			own := filepath.Join(dir, fmt.Sprint(i))
			if err := os.MkdirAll(own, 0o755); err != nil {
				return all, err
			}
			ps, err := start(k, own, listen, origin)
			all = append(all, ps...)
			if err != nil {
				return all, err
			}
		}
		return all, nil
	}
}

func sluiceShared(k *kit, _, listen, origin string) ([]*process, error) {
	return run1(k.sluice, "forward", listen, origin, "--reuse-port", "--log-level", "warn")
}

// scalePoint holds n relays over several processes that share a port, and has every one of them answer.
func (r *run) scalePoint(p peer, n int, d time.Duration) error {
	if have := meminfo("MemAvailable:"); have < float64(n)*perRelayMemory/1024+512<<10 {
		return fmt.Errorf("%d relays may need %d MiB, and %.0f are free", n, n*perRelayMemory>>20+512, have/1024)
	}
	count := r.kit.processes
	if count == 0 {
		count = scaleProcesses(n, r.kit.fds)
	}
	var origins []string
	for i := range count { // an address each, so that ports suffice
		o, err := r.newEnd("origin", "echo", fmt.Sprintf("127.0.1.%d:0", 1+i))
		if err != nil {
			return err
		}
		a, err := o.answer(10 * time.Second)
		if err != nil {
			return err
		}
		origins = append(origins, a.Addr)
	}
	listen, err := freeAddr()
	if err != nil {
		return err
	}
	r.target = listen
	if r.relay, err = p.many(r.kit, r.dir, listen, origins); err != nil {
		return fmt.Errorf("does not start: %w", err)
	}
	if err := until(r.relay, func() error { return listens(listen, count) }); err != nil {
		return fmt.Errorf("does not start: %w", err)
	}
	if err := waitRelay(listen, r.relay); err != nil {
		return fmt.Errorf("does not start: %w", err)
	}
	if err := r.sleep(max(d, 200*time.Millisecond)); err != nil { // the relay closes what waitRelay has left
		return err
	}
	r.set("processes", float64(count))
	kernel := kernelMemory() // first, because looking into /proc/PID/fd makes the kernel remember all that is there
	before := r.holds()
	held, err := r.openAll(n)
	if err != nil {
		return err
	}
	r.set("held", held)
	if err := r.sleep(3 * d); err != nil { // collectors give memory back, timers are set
		return err
	}
	kernelIdle := kernelMemory()
	idle := r.holds()
	r.set("rss_mib", idle.rss/1024)
	r.set("rss_kib", (idle.rss-before.rss)/held)
	r.set("fds", float64(idle.fds-before.fds)/held)
	r.set("kernel_kib", (kernelIdle-kernel)/held)
	if err := r.watchIdle(25 * d); err != nil { // a minute, by default: what a lost keepalive probe leads to takes as long
		return err
	}
	return r.answerAll(held)
}

// openAll opens n relays, from as many client processes as that takes, and returns how many are held.
func (r *run) openAll(n int) (held float64, err error) {
	started := time.Now()
	for i := 0; held < float64(n); i++ {
		c, err := r.newEnd("load")
		if err != nil {
			return 0, err
		}
		part := min(perProcess, n-int(held))
		q := ask{Op: "start", Load: load{Kind: "idle", Addr: r.target, Conns: part, From: fmt.Sprintf("127.0.0.%d", 2+i)}}
		a, err := c.ask(q, 3*time.Minute)
		if err != nil {
			return 0, err
		}
		if i == 0 {
			r.set("open_first_us", a.First)
		}
		r.set("open_last_us", a.Last)
		held += float64(a.N)
		if a.Why != "" {
			r.note("%.0f held, the next failed: %s", held, a.Why)
		}
		if int(a.N) < part {
			break
		}
	}
	r.set("open_s", time.Since(started).Seconds())
	return held, nil
}

// watchIdle measures what the relay and the kernel do while nothing happens.
func (r *run) watchIdle(d time.Duration) error {
	before, err := r.snapshot()
	if err != nil {
		return err
	}
	soft, probes := softirq(), keepalives()
	if err := r.sleep(d); err != nil {
		return err
	}
	after, err := r.snapshot()
	if err != nil {
		return err
	}
	s := after.at.Sub(before.at).Seconds()
	r.set("idle_cpu_ms_per_s", float64((after.relay-before.relay).Microseconds())/1e3/s)
	r.set("softirq_ms_per_s", float64((softirq()-soft).Milliseconds())/s)
	r.set("keepalives_per_s", (keepalives()-probes)/s)
	r.set("others_percent", max(0, 100*(after.others-before.others).Seconds()/(s*float64(coreCount()))))
	return nil
}

// answerAll sends a message through every relay, and then through some of them one at a time while all others are idle.
func (r *run) answerAll(held float64) error {
	began := time.Now()
	rtts, why, err := r.answers(ask{Op: "answer"})
	if err != nil {
		return err
	}
	r.set("answer_s", time.Since(began).Seconds())
	r.set("answered", float64(len(rtts)))
	r.set("answer_p50_us", micros(rtts, 0.50))
	r.set("answer_p99_us", micros(rtts, 0.99))
	if lost := int(held) - len(rtts); lost > 0 {
		r.note("%d of %.0f idle relays do not answer: %s", lost, held, why)
		return nil
	}
	clients := 0
	for _, e := range r.ends {
		if e.load {
			clients++
		}
	}
	if rtts, _, err = r.answers(ask{Op: "sample", Load: load{Conns: max(1, sampled/clients)}}); err != nil {
		return err
	}
	r.set("one_p50_us", micros(rtts, 0.50))
	r.set("one_p99_us", micros(rtts, 0.99))
	return nil
}

// answers asks each client in turn, and returns all round trips, sorted, and why others failed.
func (r *run) answers(q ask) (rtts []int32, why string, err error) {
	for _, c := range r.ends {
		if !c.load {
			continue
		}
		a, err := c.ask(q, 3*time.Minute)
		if err != nil {
			return nil, "", err
		}
		rtts = append(rtts, a.RTT...)
		why = cmp.Or(why, a.Why)
	}
	slices.Sort(rtts)
	return rtts, why, nil
}

// answerIdle makes a round trip on every idle connection, openers at a time, or where n is not 0 on n of them, one at a
// time. It returns how long each took, in ns; those that fail are counted and left out.
func (c *client) answerIdle(n int) []int32 {
	conns, workers := c.idle, openers
	if n > 0 {
		step := max(1, len(conns)/n)
		conns, workers = nil, 1
		for i := 0; i < len(c.idle); i += step {
			conns = append(conns, c.idle[i])
		}
	}
	a := answering{client: c, conns: conns, rtts: make([]int32, len(conns))}
	for range workers {
		a.all.Add(1)
		go a.run()
	}
	a.all.Wait()
	return slices.DeleteFunc(a.rtts, func(ns int32) bool { return ns == 0 })
}

// answering is round trips under way on many connections.
type answering struct {
	client *client
	conns  []net.Conn
	rtts   []int32 // 0 of one that failed
	next   atomic.Int64
	all    sync.WaitGroup
}

func (a *answering) run() {
	defer a.all.Done()
	for {
		i := int(a.next.Add(1)) - 1
		if i >= len(a.conns) {
			return
		}
		began := time.Now()
		if err := roundTrip(a.conns[i], message, 2*time.Second); err != nil {
			a.client.fail(err)
			continue
		}
		a.rtts[i] = int32(max(1, time.Since(began)))
	}
}

// ends500 returns the medians of the first and the last 500 of took, in µs.
func ends500(took []int32) (first, last float64) {
	n := min(500, len(took))
	a, b := slices.Sorted(slices.Values(took[:n])), slices.Sorted(slices.Values(took[len(took)-n:]))
	return micros(a, 0.5), micros(b, 0.5)
}

// listens returns nil if at least n sockets listen at addr.
func listens(addr string, n int) error {
	_, port, _ := net.SplitHostPort(addr)
	p, _ := strconv.Atoi(port)
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return err
	}
	if found := countListeners(string(b), p); found < n {
		return fmt.Errorf("%d of %d listen at %s", found, n, addr)
	}
	return nil
}

// countListeners counts the lines of /proc/net/tcp that are sockets listening at port.
func countListeners(text string, port int) (n int) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
			n++
		}
	}
	return n
}

// meminfo returns a value of /proc/meminfo in KiB.
func meminfo(key string) float64 {
	b, _ := os.ReadFile("/proc/meminfo")
	return parseKiB(b, key)
}

// kernelMemory returns in KiB what the kernel holds for sockets and files, and in their queues.
func kernelMemory() float64 {
	b, _ := os.ReadFile("/proc/net/sockstat")
	return meminfo("Slab:") + parseSockets(string(b))*float64(os.Getpagesize())/1024
}

// parseSockets returns the pages in the queues of TCP sockets: what stands behind mem in /proc/net/sockstat.
func parseSockets(text string) float64 {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if i := slices.Index(f, "mem"); len(f) > 0 && f[0] == "TCP:" && i > 0 && i+1 < len(f) {
			n, _ := strconv.ParseFloat(f[i+1], 64)
			return n
		}
	}
	return 0
}

// softirq returns the time that all cores have spent on packets and timers since boot.
func softirq() time.Duration {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	if f := strings.Fields(line); len(f) > 7 {
		n, _ := strconv.ParseInt(f[7], 10, 64)
		return time.Duration(n) * tick
	}
	return 0
}

// keepalives returns how many TCP keepalive probes this network namespace has sent.
func keepalives() float64 {
	b, _ := os.ReadFile("/proc/net/netstat")
	return parseNetstat(string(b), "TcpExt:", "TCPKeepAlive")
}

// parseNetstat returns a counter of /proc/net/netstat, which has a line of names and then one of values for each group.
func parseNetstat(text, group, name string) float64 {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || f[0] != group:
		case names == nil:
			names = f
		default:
			if i := slices.Index(names, name); i >= 0 && i < len(f) {
				n, _ := strconv.ParseFloat(f[i], 64)
				return n
			}
			return 0
		}
	}
	return 0
}

// projection works out from a sample what a number of relays would take.
func (r *Report) projection(peer string) string {
	get := func(key string) float64 { v, _ := median(r.values("scale", peer, key)); return v }
	held := get("held")
	if held == 0 {
		return ""
	}
	const million, mib, ports = 1e6, 1024.0, 65535 - 1024 + 1
	rss, kernel, fds := get("rss_kib"), get("kernel_kib")/2, get("fds")
	base := get("rss_mib")/get("processes") - rss*held/get("processes")/mib // of a process without relays
	few, many := scaleProcesses(million, 20000), int(million*fds/(1<<20-1000))+1
	return fmt.Sprintf(`Arithmetic, not measured: a million relays of %s, by the figures of one of %.0f:

- RSS: 10⁶ × %.2f KiB + %d processes × %.0f MiB = %.2f GiB; with %d processes, %.2f GiB.
- Kernel memory of the relay's two sockets: 10⁶ × %.1f KiB (half of what was measured for the four of a relay
  with both ends on this machine) = %.1f GiB.
- Descriptors: 10⁶ × %.0f. Processes: %d with 20 000 descriptors each, %d with fs.nr_open's default of 1 048 576.
- Keepalive: %.0f probes/s. Opening them at this rate: %.0f s. For all to answer: %.0f s.
- Ports: from one address to one address and port there are %d at most (net.ipv4.ip_local_port_range), so the relay needs
  %d pairs of a local address and a destination.
`, peer, held, rss, few, base, (million*rss/mib+float64(few)*base)/mib, many, (million*rss/mib+float64(many)*base)/mib,
		kernel, million*kernel/mib/mib, fds, few, many, get("keepalives_per_s")/held*million,
		get("open_s")/held*million, get("answer_s")/held*million, ports, (int(million)+ports-1)/ports)
}
