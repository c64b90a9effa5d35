//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestScaleProcesses(t *testing.T) {
	for _, c := range []struct{ n, fds, want int }{
		{1, 20000, 1}, {9500, 20000, 1}, {9501, 20000, 2}, {50000, 20000, 6}, {1e6, 20000, 111},
		{9500, 1 << 20, 1}, {9501, 1 << 20, 2}, {300, 1024, 25}, {10, 100, 10},
	} {
		if got := scaleProcesses(c.n, c.fds); got != c.want {
			t.Errorf("%d relays with %d descriptors: %d processes, want %d", c.n, c.fds, got, c.want)
		}
	}
	if slices.ContainsFunc(usualTests(), func(t test) bool { return t.name == "scale" }) {
		t.Error("scale is run unasked")
	}
	if got, err := pick("scale", allTests, test.is); err != nil || len(got) != 1 {
		t.Errorf("scale, asked for: %v, %v", got, err)
	}
	for _, args := range [][]string{{"-scale", "0"}, {"-scale-processes", "251"}, {"-scale", "9000000"}} {
		if _, err := parse(args, t.Output()); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}

func TestParseProcNet(t *testing.T) {
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:1F90 0100007F:AAAA 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0100007F:AAAA 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
`
	if n := countListeners(tcp, 8080); n != 2 {
		t.Errorf("%d listen at 8080, want 2", n)
	}
	if n := parseSockets("sockets: used 9\nTCP: inuse 3 orphan 0 tw 4 alloc 8 mem 17\nUDP: inuse 0 mem 256\n"); n != 17 {
		t.Errorf("%v pages, want 17", n)
	}
	if n := parseSockets("TCP: inuse 3 mem"); n != 0 {
		t.Errorf("%v pages in a line that ends early", n)
	}
	const netstat = "TcpExt: A TCPKeepAlive B\nTcpExt: 1 23 4\nIpExt: TCPKeepAlive\nIpExt: 5\n"
	if n := parseNetstat(netstat, "TcpExt:", "TCPKeepAlive"); n != 23 {
		t.Errorf("%v probes, want 23", n)
	}
	if n := parseNetstat(netstat, "IpExt:", "B"); n != 0 {
		t.Errorf("%v of a counter that is not there", n)
	}
}

func TestFirstAndLast(t *testing.T) {
	var took []int32
	for i := range int32(2000) {
		took = append(took, (i+1)*1000)
	}
	if first, last := ends500(took); first != 251 || last != 1751 {
		t.Errorf("got %v and %v, want 251 and 1751", first, last)
	}
	if first, last := ends500(took[:1]); first != 1 || last != 1 {
		t.Errorf("of one: %v and %v", first, last)
	}
	if first, last := ends500(nil); first != 0 || last != 0 {
		t.Errorf("of none: %v and %v", first, last)
	}
}

// TestSilentRelayIsFound: a relay that holds a connection but does not answer any more is not counted as one that does.
func TestSilentRelayIsFound(t *testing.T) {
	c := &client{}
	for range 3 {
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		c.idle = append(c.idle, a)
		if len(c.idle) < 3 {
			go answerAll(b)
		} else {
			b.Close()
		}
	}
	if rtts := c.answerIdle(0); len(rtts) != 2 || c.failed.Load() != 1 || c.why == nil {
		t.Errorf("two of three answer: got %v, and %d that failed: %v", rtts, c.failed.Load(), c.why)
	}
	if rtts := c.answerIdle(1); len(rtts) != 1 {
		t.Errorf("one of them, which answers: %v", rtts)
	}
}

func answerAll(c net.Conn) {
	b := make([]byte, message)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		c.Write(b[:n])
	}
}

// TestProjection holds the arithmetic to round numbers.
func TestProjection(t *testing.T) {
	r := &Report{tests: allTests}
	r.add(&Sample{Round: 1, Test: "scale", Peer: "sluice", Values: map[string]float64{"held": 50000, "processes": 5,
		"rss_mib": 100 + 50000*2/1024.0, "rss_kib": 2, "kernel_kib": 16, "fds": 2, "keepalives_per_s": 100, "open_s": 10, "answer_s": 5}})
	got := r.projection("sluice")
	for _, want := range []string{
		"by the figures of one of 50000",
		"10⁶ × 2.00 KiB + 111 processes × 20 MiB = 4.08 GiB; with 2 processes, 1.95 GiB",
		"10⁶ × 8.0 KiB", "= 7.6 GiB",
		"Descriptors: 10⁶ × 2. Processes: 111 with 20 000 descriptors each, 2 with",
		"Keepalive: 2000 probes/s. Opening them at this rate: 200 s. For all to answer: 100 s.",
		"needs\n  16 pairs",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := r.projection("nginx"); got != "" {
		t.Errorf("of a relay that was not measured: %s", got)
	}
}

// TestScaleSmoke holds a few relays over three processes, on this machine's loopback as it is.
func TestScaleSmoke(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "out.json")
	b, err := parse([]string{"-rounds", "1", "-time", "50ms", "-tests", "scale", "-scale", "60", "-scale-processes", "3",
		"-json", path, "-peers", "direct,iocopy,sluice-lib"}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	b.isolation = "none: a test"
	b.log = t.Output()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var w bytes.Buffer
	if err := b.run(ctx, self, t.TempDir(), &w); err != nil {
		t.Fatal(err)
	}
	if after := tree(processes(), os.Getpid()); len(after) != 1 {
		t.Errorf("processes are left: %+v", after)
	}
	var r Report
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Samples) != 1 || r.Samples[0].Err != "" {
		t.Fatalf("want one sample, of sluice-lib: %s", text)
	}
	v := r.Samples[0].Values
	if v["held"] != 60 || v["answered"] != 60 || v["processes"] != 3 || v["fds"] < 2 || v["fds"] > 2.5 {
		t.Errorf("60 idle relays over 3 processes, with 2 descriptors each: got %v", v)
	}
	for _, key := range []string{"open_s", "open_first_us", "open_last_us", "answer_s", "answer_p99_us", "one_p50_us"} {
		if !(v[key] > 0) {
			t.Errorf("%s is %v", key, v[key])
		}
	}
	for _, want := range []string{"| sluice-lib |   60 |", "Arithmetic, not measured: a million relays of sluice-lib"} {
		if !strings.Contains(w.String(), want) {
			t.Errorf("no %q in\n%s", want, w.String())
		}
	}
}
