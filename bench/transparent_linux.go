package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
)

// The group transparent: sluice on a router between a client and an origin that know nothing of it. On
// the host, the client is a program on the router itself, whose kernel hands over whole segments; on the LAN,
// its packets come in at MTU 1500.

// labTests are the tests in a lab.
var labTests = slices.Concat(testsAt("host"), testsAt("lan"), []test{
	{name: "lan-idle", group: "transparent", place: "lan", load: load{Kind: "idle"}, once: true},
})

// quickTransparent are those of -quick.
const quickTransparent = "host-up1,host-down1,host-pp1,lan-up1,lan-down1,lan-short,lan-udp,lan-idle"

func testsAt(place string) []test {
	all := []test{
		{name: "up1", load: load{Kind: "bulk", Conns: 1, Dir: opUpload}},
		{name: "up8", load: load{Kind: "bulk", Conns: 8, Dir: opUpload}},
		{name: "down1", load: load{Kind: "bulk", Conns: 1, Dir: opDownload}},
		{name: "down8", load: load{Kind: "bulk", Conns: 8, Dir: opDownload}},
		{name: "pp1", load: load{Kind: "pingpong", Conns: 1}},
		{name: "short", load: load{Kind: "short", Conns: 32}},
		{name: "udp", load: load{Kind: "udp"}},
	}
	for i := range all {
		all[i].name, all[i].group, all[i].place = place+"-"+all[i].name, "transparent", place
	}
	return all
}

func placeOf(t test) place {
	if t.place == "host" {
		return atRouter
	}
	return atClient
}

// labPort is where a relay in a lab listens.
const labPort = "12345"

// labPeers are what is measured in a lab.
var labPeers = []peer{
	{name: "kernel", about: "no relay: the router's kernel forwards, or the client on it connects", lab: true},
	{name: "forward", about: "sluice forward, which the client knows of", lab: true, not: []string{"pingpong", "short", "udp", "idle"},
		args: func(_ place, origin string) []string { return []string{"forward", labForward, origin} }},
	{name: "redirect", about: "sluice redirect --setup", lab: true, not: []string{"udp"}, args: captureArgs("redirect")},
	{name: "tproxy", about: "sluice tproxy --setup", lab: true, args: captureArgs("tproxy")},
	{name: "tun", about: "sluice tun", lab: true, args: func(place, string) []string { return []string{"tun"} }},
}

const labForward = labRouter + ":" + labPort

func captureArgs(command string) func(place, string) []string {
	return func(from place, _ string) []string {
		if from == atRouter {
			return []string{command, labPort, "--setup"}
		}
		return []string{command, ":" + labPort, "--setup", "--from", labLANName}
	}
}

// startRouter starts a relay on the lab's router, and returns when connections go through it.
func (r *run) startRouter(p peer, origin string) error {
	r.target = origin
	if p.args == nil {
		return nil
	}
	err := r.lab.within(atRouter, func() (err error) {
		r.relay, err = run1(r.kit.sluice, append(p.args(r.from, origin), "--log-level", "warn")...)
		return err
	})
	if err != nil {
		return err
	}
	if p.name == "forward" {
		r.target = labForward
		return r.lab.within(r.from, func() error { return waitRelay(r.target, r.relay) })
	}
	return until(r.relay, func() error { return r.lab.relayed(r.from) })
}

// closeLab asks the relay to end, since it may have noted outside the lab what it did in it, and gives
// the lab up.
func (r *run) closeLab() {
	for _, p := range r.relay {
		for range 2 { // at the second, it does not wait for its sessions
			select {
			case <-p.done:
			default:
				p.cmd.Process.Signal(syscall.SIGTERM)
			}
			select {
			case <-p.done:
			case <-time.After(time.Second):
			}
		}
	}
	stopAll(r.relay)
	r.lab.close()
}

// losses compares the datagrams that were sent in all with those that were received.
func (r *run) losses() error {
	if err := r.sleep(200 * time.Millisecond); err != nil { // those under way
		return err
	}
	s, err := r.snapshot()
	if err != nil {
		return err
	}
	if s.n[1] == 0 {
		return errors.New("nothing was sent")
	}
	lost := s.n[1] - s.n[0]
	r.set("lost_percent", max(0, 100*float64(lost)/float64(s.n[1])))
	if lost > 0 {
		r.noteLosses(lost)
	}
	return nil
}

// noteLosses says where datagrams were lost, as far as the kernel counts it: the rest is the relay's own doing.
func (r *run) noteLosses(lost int64) {
	full := make(map[place]int64)
	for _, at := range []place{atRouter, atOrigin} {
		r.lab.within(at, func() error {
			b, err := os.ReadFile("/proc/thread-self/net/snmp")
			full[at] = parseSNMP(b, "Udp:", "RcvbufErrors")
			return err
		})
	}
	queue := int64(0)
	r.lab.within(atRouter, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if s := l.Attrs().Statistics; s != nil && l.Type() == "tuntap" {
				queue += int64(s.TxDropped)
			}
		}
		return err
	})
	r.note("of %d datagrams lost, %d were too many for the relay's sockets, %d for the device's queue, %d for the origin",
		lost, full[atRouter], queue, full[atOrigin])
}

// parseSNMP returns a counter out of /proc/net/snmp, which has a line of names and one of values for each protocol.
func parseSNMP(b []byte, proto, name string) int64 {
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != proto {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		if i := slices.Index(names, name); i > 0 && i < len(f) {
			n, _ := strconv.ParseInt(f[i], 10, 64)
			return n
		}
		return 0
	}
	return 0
}

// datagramFigures works out what only datagrams have, of the ends origin and client.
func (r *run) datagramFigures(a, b snapshot) {
	mbit := func(end int) float64 {
		return float64(b.n[end]-a.n[end]) * datagram * 8 / (float64(b.t[end]-a.t[end]) / 1e9) / 1e6
	}
	r.set("offered_mbit_s", mbit(1))
	r.set("mbit_s", mbit(0))
	r.set("relay_cpu_percent", 100*(b.relay-a.relay).Seconds()/b.at.Sub(a.at).Seconds())
}

// labTables are the report's tables of the group.
var labTables = []table{
	labTable("Transparent: Gbit/s (× kernel)", "bulk", metric{key: "gbit_s", name: "Gbit/s", format: "%.1f", more: true, ofLimit: true}),
	labTable("Transparent: relay CPU s/GB", "bulk", metric{key: "relay_cpu_s_per_gb", name: "CPU s/GB", format: "%.2f"}),
	labTable("Transparent: one ping-pong, p50 µs (× kernel)", "pingpong", metric{key: "p50_us", name: "p50", format: "%.0f", ofLimit: true}),
	labTable("Transparent: short connections/s (× kernel) · CPU s/10k", "short",
		metric{key: "conn_s", name: "connections/s", format: "%.0f", more: true, ofLimit: true},
		metric{key: "relay_cpu_s_per_10k", name: "CPU s/10k", format: "%.2f"}),
	labTable("Transparent: datagrams of 1400 bytes, 500 Mbit/s: offered · received Mbit/s · lost % · relay CPU % of a core", "udp",
		metric{key: "offered_mbit_s", format: "%.0f"}, metric{key: "mbit_s", name: "Mbit/s", format: "%.0f", more: true},
		metric{key: "lost_percent", format: "%.2f"}, metric{key: "relay_cpu_percent", name: "CPU", format: "%.0f"}),
	labTable("Transparent: idle flows: held · RSS KiB · descriptors of each", "idle",
		metric{key: "held", format: "%.0f"}, metric{key: "rss_kib", name: "RSS", format: "%.2f"}, metric{key: "fds", format: "%.2f"}),
}

// labTable is a table of metrics with a column for each test in a lab of a kind.
func labTable(title, kind string, ms ...metric) table {
	t := table{title: title}
	for _, test := range labTests {
		if test.load.Kind != kind {
			continue
		}
		var cell []metric
		for _, m := range ms {
			m.test = test.name
			if m.name != "" {
				m.name = test.name + " " + m.name
			}
			cell = append(cell, m)
		}
		t.heads, t.cells = append(t.heads, test.name), append(t.cells, cell)
	}
	return t
}

// labSubjects and labBases are what subjects and bases are for the tests in a lab.
var (
	labSubjects = []string{"tun", "tproxy", "redirect"}
	labBases    = []string{"kernel", "forward", "redirect"}
)

// limitOf returns the peer that is no relay in a test.
func limitOf(test string) string {
	if strings.HasPrefix(test, "host-") || strings.HasPrefix(test, "lan-") {
		return "kernel"
	}
	return "direct"
}

// goal is what sluice is to reach in a lab.
type goal struct {
	peer, key string
	tests     []string
	over      string // the peer whose figure is the unit; empty: none
	least     bool   // at least want; otherwise at most
	want      float64
}

var goals = []goal{
	{"tun", "gbit_s", []string{"up1", "up8"}, "redirect", true, 0.6},
	{"tun", "gbit_s", []string{"down1", "down8"}, "redirect", true, 0.35},
	{"tun", "relay_cpu_s_per_gb", []string{"up1", "up8"}, "", false, 0.5},
	{"tun", "relay_cpu_s_per_gb", []string{"down1", "down8"}, "", false, 0.8},
	{"redirect", "gbit_s", []string{"up1", "up8", "down1", "down8"}, "forward", true, 0.95},
	{"tproxy", "gbit_s", []string{"up1", "up8", "down1", "down8"}, "forward", true, 0.95},
	{"tun", "lost_percent", []string{"udp"}, "", false, 0},
	{"tun", "rss_kib", []string{"idle"}, "", false, 24},
}

// goalRows returns the rows of the table of goals that the run can judge.
func (r *Report) goalRows() (rows [][]string) {
	for _, g := range goals {
		row, some := []string{g.String()}, false
		for _, place := range []string{"host", "lan"} {
			var cell []string
			for _, t := range g.tests {
				if v, ok := r.reached(g, place+"-"+t); ok {
					cell, some = append(cell, fmt.Sprintf("%s %.2f", t, v)), true
				}
			}
			if len(cell) == 0 {
				cell = []string{"–"}
			}
			row = append(row, strings.Join(cell, " · "))
		}
		if some {
			rows = append(rows, row)
		}
	}
	return rows
}

// reached returns what g is about, in one test.
func (r *Report) reached(g goal, test string) (float64, bool) {
	vs := r.values(test, g.peer, g.key)
	if g.over == "" {
		return median(vs)
	}
	return ratio(vs, r.values(test, g.over, g.key))
}

func (g goal) String() string {
	sign, what := "≤", map[string]string{"gbit_s": "Gbit/s", "relay_cpu_s_per_gb": "CPU s/GB", "lost_percent": "% lost",
		"rss_kib": "KiB an idle flow"}[g.key]
	if g.least {
		sign = "≥"
	}
	if g.over != "" {
		what += " ÷ " + g.over
	}
	return fmt.Sprintf("%s, %s %s %v", g.peer, what, sign, g.want)
}
