//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestMain lets the test binary be the ends and the baselines that the benchmark starts of itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "-serve" || os.Args[1] == "-end") {
		os.Exit(run0(os.Args[1:]))
	}
	os.Exit(m.Run())
}

func TestParseStat(t *testing.T) {
	const rest = " S 7 1 1 0 -1 4194560 1 2 3 4 150 25 30 5 20 0 1 0 100 1000 10"
	for _, name := range []string{"nginx", "a b", "evil) S 9 9", "((", ")"} {
		s, err := parseStat("42 (" + name + ")" + rest)
		want := stat{pid: 42, parent: 7, own: 1750 * time.Millisecond, reaped: 350 * time.Millisecond}
		if err != nil || s != want {
			t.Errorf("command %q: got %+v, %v, want %+v", name, s, err, want)
		}
	}
	for _, line := range []string{"", "42", "42 (x", "x (x)" + rest, "42 (x) S 7",
		"42 (x)" + strings.Replace(rest, "150", "?", 1)} {
		if s, err := parseStat(line); err == nil {
			t.Errorf("%q: got %+v, want an error", line, s)
		}
	}
}

func TestTree(t *testing.T) {
	// The child stands before its parent, as it does once pids have wrapped around.
	all := []stat{{pid: 3, parent: 9}, {pid: 1}, {pid: 9, parent: 5}, {pid: 5, parent: 1}, {pid: 6, parent: 1}}
	var got []int
	for _, s := range tree(all, 5) {
		got = append(got, s.pid)
	}
	if len(got) != 3 || got[0] != 3 || got[1] != 9 || got[2] != 5 {
		t.Errorf("descendants of 5: got %v, want 3 9 5", got)
	}
}

func TestParseBusy(t *testing.T) {
	// user nice system idle iowait irq softirq steal guest guest_nice
	if got, want := parseBusy("cpu  100 20 30 9999 999 4 5 6 70 80"), 1650*time.Millisecond; got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestParseKiB(t *testing.T) {
	b := []byte("0-1 ---p 00000000 00:00 0 [rollup]\nRss:      1234 kB\nPss:       617 kB\nPss_Dirty: 5 kB\n")
	if got := parseKiB(b, "Pss:"); got != 617 {
		t.Errorf("Pss: got %v, want 617", got)
	}
	if got := parseKiB(b, "Swap:"); got != 0 {
		t.Errorf("a key that is not there: got %v, want 0", got)
	}
}

// TestOwnFigures reads this process, whose figures are known well enough.
func TestOwnFigures(t *testing.T) {
	for began := time.Now(); time.Since(began) < 30*time.Millisecond; {
	}
	me := tree(processes(), os.Getpid())
	if d := cpu(me); d < 5*time.Millisecond || d > time.Hour {
		t.Errorf("cpu is %v", d)
	}
	before := holds(me)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	after := holds(me)
	if after.fds-before.fds != 2 || after.pipes-before.pipes != 1 {
		t.Errorf("a pipe is %d descriptors and %d pipes, want 2 and 1", after.fds-before.fds, after.pipes-before.pipes)
	}
	if after.rss < 1000 || after.pss > after.rss {
		t.Errorf("rss %v KiB, pss %v KiB", after.rss, after.pss)
	}
}

func TestMedianAndRatio(t *testing.T) {
	for _, c := range []struct {
		of   map[int]float64
		want float64
		ok   bool
	}{
		{nil, 0, false},
		{map[int]float64{2: 7}, 7, true},
		{map[int]float64{1: 9, 2: 1, 3: 4}, 4, true},
		{map[int]float64{1: 9, 2: 1, 3: 4, 4: 6}, 5, true},
	} {
		if got, ok := median(c.of); got != c.want || ok != c.ok {
			t.Errorf("median of %v: got %v, %v, want %v, %v", c.of, got, ok, c.want, c.ok)
		}
	}
	// Within each round a is twice b, while the machine's speed drifts: the ratio must not see the drift.
	a, b := map[int]float64{1: 2, 2: 20, 3: 200, 4: 5}, map[int]float64{1: 1, 2: 10, 3: 100, 5: 1}
	if q, ok := ratio(a, b); q != 2 || !ok {
		t.Errorf("ratio: got %v, %v, want 2", q, ok)
	}
	if _, ok := ratio(a, map[int]float64{1: 0}); ok {
		t.Error("a ratio to nothing")
	}
}

func TestMicros(t *testing.T) {
	var s []int32
	for i := range int32(100) {
		s = append(s, (i+1)*1000)
	}
	if p50, p99 := micros(s, 0.50), micros(s, 0.99); p50 != 51 || p99 != 100 {
		t.Errorf("got %v and %v, want 51 and 100", p50, p99)
	}
	if micros(nil, 0.5) != 0 {
		t.Error("the median of nothing is not 0")
	}
}

func TestMarkdown(t *testing.T) {
	r := &Report{tests: allTests[:1], missing: map[string]string{"socat": "socat is not installed"},
		Settings: map[string]string{"rounds": "2", "time": "3s"}, Peers: []PeerFacts{
			{Name: "direct", About: "no relay"}, {Name: "haproxy", About: "mode tcp", Version: "2.6"},
			{Name: "socat", Missing: "socat is not installed"}, {Name: "sluice"}}}
	for round, drift := range []float64{1, 2} {
		for peer, v := range map[string]float64{"direct": 40, "haproxy": 10, "sluice": 25} {
			r.add(&Sample{Round: round + 1, Test: "up1", Peer: peer, Values: map[string]float64{"gbit_s": v * drift,
				"relay_cpu_s_per_gb": 1 / v, "relay_to_ends": 10 / v, "others_percent": 20}})
		}
	}
	r.add(&Sample{Round: 2, Test: "up1", Peer: "nginx", Err: "hangs"})
	var w bytes.Buffer
	if err := r.markdown(&w); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(w.String()), " ") // whatever the widths
	for _, want := range []string{
		"| relay | up1 |",
		"| direct | 60.0 |",
		"| haproxy | 15.0 (0.25) |",
		"| sluice | 37.5 (0.62) |",
		"| sluice | 0.04 · 0.40 |",
		"| ratio | sluice ÷ direct | sluice ÷ haproxy | sluice ÷ best |",
		"| bulk up1 Gbit/s ↑ | 0.62 | 2.50 | 2.50 haproxy |",
		"| bulk up1 CPU s/GB ↓ | – | 0.40 | 0.40 haproxy |",
		"not quiet",
		"- socat was not measured: socat is not installed",
		"- nginx, up1, round 2 failed: hangs",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, w.String())
		}
	}
	if strings.Contains(got, "connections") || strings.Contains(got, "Idle relays") {
		t.Errorf("a table of tests that were not run in\n%s", w.String())
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-time", "1ms"}, {"x"}, {"-exec", "x"}, {"-exec", "=cat"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
	b, err := parse([]string{"-quick", "-idle", "7"}, io.Discard)
	if err != nil || b.idle != 7 || b.rounds != 1 || b.tests == "" {
		t.Errorf("-quick -idle 7: got %+v, %v", b, err)
	}
	if _, err := pick("up1,nonsense", allTests, test.is); err == nil {
		t.Error("a test that does not exist was taken")
	}
	if got, _ := pick("msg,up1", allTests, test.is); len(got) != 3 {
		t.Errorf("msg,up1: got %d tests, want 3", len(got))
	}
}

// TestStopReapsAll stops a process whose children have left its process group.
func TestStopReapsAll(t *testing.T) {
	proxytest.Need(t, "setsid")
	adopt()
	p, err := launch(nil, "/bin/sh", "-c", "setsid sleep 60 & setsid sleep 60 & wait")
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for len(tree(processes(), p.pid())) < 3 {
		if time.Now().After(deadline) {
			t.Fatal("the children do not start")
		}
		time.Sleep(time.Millisecond)
	}
	all := tree(processes(), p.pid())
	p.stop()
	for _, s := range all {
		if _, err := os.Stat(filepath.Join("/proc", fmt.Sprint(s.pid))); err == nil {
			t.Errorf("process %d of %v is still there", s.pid, all)
		}
	}
}

// TestQuickSmoke measures with tiny durations, on this machine's loopback as it is.
func TestQuickSmoke(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "out.json")
	b, err := parse([]string{"-rounds", "1", "-time", "50ms", "-idle", "20", "-json", path,
		"-peers", "direct,iocopy,absent,broken", "-tests", "up1,both8,pp64,pp1,short,idle",
		"-exec", "absent=no-such-relay {listen} {origin}", "-exec", "broken=false {listen}"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	b.isolation = "none: a test"
	b.log = t.Output()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	before := holds(tree(processes(), os.Getpid()))
	var w bytes.Buffer
	if err := b.run(ctx, self, dir, &w); err != nil {
		t.Fatal(err)
	}
	if after := tree(processes(), os.Getpid()); len(after) != 1 {
		t.Errorf("processes are left: %+v", after)
	} else if h := holds(after); h.fds > before.fds+1 { // the runtime's epoll
		t.Errorf("%d descriptors, %d before", h.fds, before.fds)
	}
	var r Report
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Samples {
		if s.Peer == "broken" {
			if !strings.HasPrefix(s.Err, "does not start") {
				t.Errorf("a relay that ends at once: got %q", s.Err)
			}
			continue
		}
		if s.Err != "" {
			t.Errorf("%s %s: %s", s.Peer, s.Test, s.Err)
		}
		key := map[string]string{"up1": "gbit_s", "both8": "gbit_s", "pp64": "msg_s", "pp1": "p50_us",
			"short": "conn_s", "idle": "held"}[s.Test]
		if v := s.Values[key]; !(v > 0) || math.IsInf(v, 0) {
			t.Errorf("%s %s: %s is %v", s.Peer, s.Test, key, v)
		}
		if fds := s.Values["fds"]; s.Test == "idle" && (fds < 5.5 || fds > 6.5 || s.Values["held"] != 20) {
			t.Errorf("20 idle relays of two io.Copy: got %+v, want 6 descriptors each", s.Values)
		}
	}
	if len(r.Samples) != 6+5+1 {
		t.Errorf("%d samples, want 12", len(r.Samples))
	}
	for _, want := range []string{"| iocopy", "absent was not measured: no-such-relay is not installed",
		"broken was not measured"} {
		if !strings.Contains(w.String(), want) {
			t.Errorf("no %q in\n%s", want, w.String())
		}
	}
}
