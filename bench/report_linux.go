package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// metric is a value of a sample that the tables show.
type metric struct {
	test, key string
	name      string // in the ratio table
	format    string
	more      bool // more is better
	ofLimit   bool // shown beside its ratio to what goes without a relay
}

// table is one of the report's tables of absolute figures.
type table struct {
	title string
	heads []string
	cells [][]metric // a cell may hold several, joined by " · "
}

func bulkMetric(key, format string, test string) metric {
	m := metric{test: test, key: key, format: format, more: key == "gbit_s", ofLimit: key == "gbit_s"}
	m.name = map[string]string{"gbit_s": "bulk %s Gbit/s", "relay_cpu_s_per_gb": "bulk %s CPU s/GB",
		"relay_to_ends": "bulk %s CPU ÷ ends"}[key]
	m.name = fmt.Sprintf(m.name, test)
	return m
}

func bulkTable(title string, cell ...[2]string) table {
	t := table{title: title}
	for _, b := range allTests {
		if b.group != "bulk" {
			continue
		}
		var c []metric
		for _, kf := range cell {
			c = append(c, bulkMetric(kf[0], kf[1], b.name))
		}
		t.heads, t.cells = append(t.heads, b.name), append(t.cells, c)
	}
	return t
}

var tables = append([]table{
	bulkTable("Bulk: Gbit/s (× direct)", [2]string{"gbit_s", "%.1f"}),
	bulkTable("Bulk: relay CPU s/GB · relay CPU ÷ ends' CPU",
		[2]string{"relay_cpu_s_per_gb", "%.2f"}, [2]string{"relay_to_ends", "%.2f"}),
	{"Messages of 64 bytes and short connections (× direct)",
		[]string{"64 ping-pongs msg/s", "CPU s/10k msg", "one ping-pong p50 µs", "p99 µs", "conn/s", "CPU s/10k conn"},
		[][]metric{
			{{"pp64", "msg_s", "64 ping-pongs msg/s", "%.0f", true, true}},
			{{"pp64", "relay_cpu_s_per_10k", "CPU s/10k msg", "%.3f", false, false}},
			{{"pp1", "p50_us", "one ping-pong p50", "%.0f", false, true}},
			{{"pp1", "p99_us", "one ping-pong p99", "%.0f", false, false}},
			{{"short", "conn_s", "short connections/s", "%.0f", true, true}},
			{{"short", "relay_cpu_s_per_10k", "CPU s/10k connections", "%.2f", false, false}},
		}},
	{"Idle relays: what one holds",
		[]string{"held", "RSS KiB", "PSS KiB", "RSS · PSS KiB after a burst", "descriptors", "pipes in all", "after a burst"},
		[][]metric{
			{{"idle", "held", "", "%.0f", true, false}},
			{{"idle", "rss_kib", "idle RSS", "%.2f", false, false}},
			{{"idle", "pss_kib", "", "%.2f", false, false}},
			{{"idle", "rss_burst_kib", "idle RSS after a burst", "%.2f", false, false},
				{"idle", "pss_burst_kib", "", "%.2f", false, false}},
			{{"idle", "fds", "idle descriptors", "%.2f", false, false}},
			{{"idle", "pipes", "", "%.0f", false, false}},
			{{"idle", "pipes_burst", "", "%.0f", false, false}},
		}},
	{"Many idle relays over processes that share a port",
		[]string{"held", "answered", "processes", "RSS MiB", "RSS KiB a relay", "kernel KiB a relay", "descriptors",
			"CPU ms/s idle", "softirq ms/s", "keepalives/s"},
		[][]metric{
			{{"scale", "held", "", "%.0f", true, false}},
			{{"scale", "answered", "", "%.0f", true, false}},
			{{"scale", "processes", "", "%.0f", false, false}},
			{{"scale", "rss_mib", "", "%.0f", false, false}},
			{{"scale", "rss_kib", "RSS of one of many idle relays", "%.2f", false, false}},
			{{"scale", "kernel_kib", "kernel memory of one", "%.1f", false, false}},
			{{"scale", "fds", "descriptors of one", "%.2f", false, false}},
			{{"scale", "idle_cpu_ms_per_s", "", "%.2f", false, false}},
			{{"scale", "softirq_ms_per_s", "", "%.1f", false, false}},
			{{"scale", "keepalives_per_s", "", "%.0f", false, false}},
		}},
	{"Many idle relays: opened, and answering",
		[]string{"opened in s", "to open the first 500, p50 µs", "the last 500", "all answered in s",
			"32 at a time, p50 · p99 µs", "one at a time, p50 · p99 µs"},
		[][]metric{
			{{"scale", "open_s", "to open many", "%.2f", false, false}},
			{{"scale", "open_first_us", "", "%.0f", false, false}},
			{{"scale", "open_last_us", "", "%.0f", false, false}},
			{{"scale", "answer_s", "for many to answer", "%.2f", false, false}},
			{{"scale", "answer_p50_us", "", "%.0f", false, false}, {"scale", "answer_p99_us", "", "%.0f", false, false}},
			{{"scale", "one_p50_us", "an answer among many", "%.0f", false, false},
				{"scale", "one_p99_us", "", "%.0f", false, false}},
		}},
}, labTables...)

// Report is what a run has found. It is written as JSON as it stands.
type Report struct {
	Machine  map[string]string `json:"machine"`
	Settings map[string]string `json:"settings"`
	Peers    []PeerFacts       `json:"peers"`
	Took     string            `json:"took"`
	Summary  []Summary         `json:"summary"`
	Samples  []*Sample         `json:"samples"`

	tests   []test
	missing map[string]string // peers that cannot run, with the reason
}

// PeerFacts says what a peer was.
type PeerFacts struct {
	Name    string `json:"name"`
	About   string `json:"about"`
	Version string `json:"version,omitempty"`
	Missing string `json:"missing,omitempty"` // why it was not measured
}

// Summary is the median and the spread of one value over the rounds.
type Summary struct {
	Test   string  `json:"test"`
	Peer   string  `json:"peer"`
	Key    string  `json:"key"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

func newReport(b *bench, k *kit, peers []peer, tests []test) *Report {
	r := &Report{tests: tests, missing: make(map[string]string)}
	var uts unix.Utsname
	unix.Uname(&uts)
	load, _ := os.ReadFile("/proc/loadavg")
	r.Machine = map[string]string{
		"kernel": unix.ByteSliceToString(uts.Release[:]), "arch": runtime.GOARCH, "cpu": cpuModel(),
		"cores": fmt.Sprint(coreCount()), "go": runtime.Version(),
		"load average at the start": strings.Join(strings.Fields(string(load))[:3], " "),
		"congestion control":        sysctl("net/ipv4/tcp_congestion_control"),
		"pipe-user-pages-soft":      sysctl("fs/pipe-user-pages-soft"),
		"open files":                fmt.Sprint(k.fds),
	}
	r.Settings = map[string]string{
		"rounds": fmt.Sprint(b.rounds), "time": b.time.String(), "idle": fmt.Sprint(b.idle), "isolation": b.isolation,
		"threads": map[bool]string{true: "one a core", false: fmt.Sprint(b.threads)}[b.threads == 0],
	}
	for _, p := range peers {
		f := PeerFacts{Name: p.name, About: p.about}
		if err := k.missing(p); err != nil {
			f.Missing = err.Error()
			r.missing[p.name] = f.Missing
			fmt.Fprintf(b.log, "%s is left out: %v\n", p.name, err)
		} else if isProgram(p.name) {
			f.Version = versionOf([]string{k.sluice, "version"})
		} else {
			f.Version = versionOf(p.version)
		}
		r.Peers = append(r.Peers, f)
	}
	return r
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// add takes a sample in. A peer that did not start is not tried again.
func (r *Report) add(s *Sample) {
	r.Samples = append(r.Samples, s)
	if strings.HasPrefix(s.Err, "does not start") {
		r.missing[s.Peer] = s.Err
		for i := range r.Peers {
			if r.Peers[i].Name == s.Peer {
				r.Peers[i].Missing = s.Err
			}
		}
	}
}

// String is the sample on one line, for the log.
func (s *Sample) String() string {
	if s.Err != "" {
		return "failed: " + s.Err
	}
	var f []string
	for _, t := range tables {
		for _, m := range slices.Concat(t.cells...) {
			if v, ok := s.Values[m.key]; ok && m.test == s.Test {
				f = append(f, m.key+"="+fmt.Sprintf(m.format, v))
			}
		}
	}
	return strings.Join(append(f, s.Notes...), " ")
}

// values returns a value of a peer in each round that has it.
func (r *Report) values(test, peer, key string) map[int]float64 {
	vs := make(map[int]float64)
	for _, s := range r.Samples {
		if v, ok := s.Values[key]; ok && s.Err == "" && s.Test == test && s.Peer == peer {
			vs[s.Round] = v
		}
	}
	return vs
}

// median returns the middle of vs, and false where there is none.
func median(vs map[int]float64) (float64, bool) {
	var s []float64
	for _, v := range vs {
		s = append(s, v)
	}
	if len(s) == 0 {
		return 0, false
	}
	slices.Sort(s)
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2, true
}

// ratio returns the median of a ÷ b over the rounds that have both.
func ratio(a, b map[int]float64) (float64, bool) {
	q := make(map[int]float64)
	for round, v := range a {
		if w, ok := b[round]; ok && w > 0 {
			q[round] = v / w
		}
	}
	return median(q)
}

func (r *Report) summarize() {
	r.Summary = nil
	seen := make(map[[3]string]bool)
	for _, s := range r.Samples {
		for key := range s.Values {
			id := [3]string{s.Test, s.Peer, key}
			if seen[id] {
				continue
			}
			seen[id] = true
			vs := r.values(s.Test, s.Peer, key)
			sum := Summary{Test: s.Test, Peer: s.Peer, Key: key, N: len(vs)}
			for _, v := range vs {
				if sum.Min == 0 && sum.Max == 0 {
					sum.Min, sum.Max = v, v
				}
				sum.Min, sum.Max = min(sum.Min, v), max(sum.Max, v)
			}
			var ok bool
			if sum.Median, ok = median(vs); ok {
				r.Summary = append(r.Summary, sum)
			}
		}
	}
	slices.SortFunc(r.Summary, func(a, b Summary) int {
		return strings.Compare(a.Test+"\x00"+a.Peer+"\x00"+a.Key, b.Test+"\x00"+b.Peer+"\x00"+b.Key)
	})
}

func (r *Report) writeJSON(path string) error {
	r.summarize()
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// noise returns the median share of the machine that others took while a sample was measured, and the largest. It is
// not known of idle relays, where nothing depends on it.
func (r *Report) noise() (mid, most float64, known bool) {
	vs := make(map[int]float64)
	for i, s := range r.Samples {
		if v, ok := s.Values["others_percent"]; ok {
			vs[i] = v
			most = max(most, v)
		}
	}
	mid, known = median(vs)
	return mid, most, known
}
