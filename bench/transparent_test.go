//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestLabTestsAreRunWhenAskedFor(t *testing.T) {
	if slices.ContainsFunc(usualTests(), func(t test) bool { return t.place != "" }) {
		t.Error("tests in a lab are run unasked")
	}
	for list, want := range map[string]int{"transparent": 15, "host": 7, "lan": 8, "lan-udp,host-pp1": 2} {
		if got, err := pick(list, allTests, test.is); err != nil || len(got) != want {
			t.Errorf("%s: %d tests, %v, want %d", list, len(got), err, want)
		}
	}
	if got, err := pick(quickTransparent, allTests, test.is); err != nil || len(got) != 8 {
		t.Errorf("the quick ones: %d, %v", len(got), err)
	}
	b, err := parse([]string{"-quick", "-tests", "transparent"}, io.Discard)
	if err != nil || b.tests != quickTransparent || b.rounds != 1 {
		t.Errorf("-quick: got %+v, %v", b, err)
	}
	peers, takes := allPeers(new(kit)), make(map[string][]string)
	for _, test := range allTests {
		for _, p := range peers {
			if p.takes(test) && (p.lab || p.name == "direct") {
				takes[test.name] = append(takes[test.name], p.name)
			}
		}
	}
	for test, want := range map[string]string{
		"up1": "direct", "idle": "", "host-up1": "kernel forward redirect tproxy tun", "lan-short": "kernel redirect tproxy tun",
		"lan-udp": "kernel tproxy tun", "lan-idle": "redirect tproxy tun",
	} {
		if got := strings.Join(takes[test], " "); got != want {
			t.Errorf("%s is measured with %q, want %q", test, got, want)
		}
	}
}

func TestParseSNMP(t *testing.T) {
	const text = "Tcp: RtoMin InErrs\nTcp: 200 9\nUdp: InDatagrams RcvbufErrors\nUdp: 1000 17\n"
	for _, c := range []struct {
		proto, name string
		want        int64
	}{{"Udp:", "RcvbufErrors", 17}, {"Tcp:", "InErrs", 9}, {"Udp:", "Absent", 0}, {"Icmp:", "InErrs", 0}} {
		if got := parseSNMP([]byte(text), c.proto, c.name); got != c.want {
			t.Errorf("%s %s: got %d, want %d", c.proto, c.name, got, c.want)
		}
	}
	if got := parseSNMP([]byte("Udp: A B\nUdp: 1\n"), "Udp:", "B"); got != 0 {
		t.Errorf("a line that is too short: got %d", got)
	}
}

func TestLabMarkdown(t *testing.T) {
	all := allPeers(new(kit))
	tests, err := pick("host-up8,lan-up1,lan-idle", allTests, test.is)
	if err != nil {
		t.Fatal(err)
	}
	r := &Report{tests: tests, missing: make(map[string]string), Settings: map[string]string{}}
	for _, p := range all {
		if p.lab {
			r.Peers = append(r.Peers, PeerFacts{Name: p.name})
		}
	}
	for peer, v := range map[string]float64{"kernel": 40, "forward": 25, "redirect": 24, "tun": 12} {
		r.add(&Sample{Round: 1, Test: "lan-up1", Peer: peer, Values: map[string]float64{"gbit_s": v, "relay_cpu_s_per_gb": 6 / v}})
		r.add(&Sample{Round: 1, Test: "host-up8", Peer: peer, Values: map[string]float64{"gbit_s": v}})
	}
	r.add(&Sample{Round: 1, Test: "lan-idle", Peer: "tun", Values: map[string]float64{"held": 5000, "rss_kib": 20, "fds": 1}})
	var w bytes.Buffer
	if err := r.markdown(&w); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(w.String()), " ")
	for _, want := range []string{
		"| relay | host-up8 | lan-up1 |",
		"| kernel | 40.0 | 40.0 |",
		"| tun | 12.0 (0.30) | 12.0 (0.30) |",
		"| forward | – | 0.24 |",
		"| tun | 5000 · 20.00 · 1.00 |",
		"| tun, Gbit/s ÷ redirect ≥ 0.6 | up8 0.50 | up1 0.50 |",
		"| redirect, Gbit/s ÷ forward ≥ 0.95 | up8 0.96 | up1 0.96 |",
		"| tun, CPU s/GB ≤ 0.5 | – | up1 0.50 |",
		"| tun, KiB an idle flow ≤ 24 | – | idle 20.00 |",
		"| ratio | tun ÷ kernel | tun ÷ forward | tun ÷ redirect |",
		"| lan-up1 Gbit/s ↑ | 0.30 | 0.48 | 0.50 |",
		"| ratio | redirect ÷ kernel | redirect ÷ forward |",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, w.String())
		}
	}
}

// networkHere is what a measurement could leave in this network namespace.
func networkHere(t *testing.T) string {
	var all []string
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		all = append(all, l.Attrs().Name)
	}
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		all = append(all, fmt.Sprint(r.Priority, r.Table))
	}
	return strings.Join(all, " ")
}

func TestLabLeavesNothing(t *testing.T) {
	proxytest.NeedRoot(t)
	before, fds := networkHere(t), holds(tree(processes(), os.Getpid())).fds
	l, err := newLab("reno")
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []place{atClient, atRouter} {
		if err := l.relayed(from); err == nil || err.Error() != "connections go past it" {
			t.Errorf("without a relay, from %d: got %v", from, err)
		}
	}
	err = l.within(atRouter, func() error {
		if _, err := netlink.LinkByName(labLANName); err != nil {
			return err
		}
		return fmt.Errorf("tell")
	})
	if err == nil || err.Error() != "tell" {
		t.Errorf("within the router: got %v", err)
	}
	l.close()
	if after := networkHere(t); after != before {
		t.Errorf("here are now %s, before %s", after, before)
	}
	if now := holds(tree(processes(), os.Getpid())).fds; now > fds+1 { // the runtime's epoll
		t.Errorf("%d descriptors, %d before", now, fds)
	}
}

// TestTransparentSmoke measures with tiny durations.
func TestTransparentSmoke(t *testing.T) {
	proxytest.NeedRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "out.json")
	b, err := parse([]string{"-rounds", "1", "-time", "50ms", "-json", path, "-peers", "kernel,redirect,tun",
		"-tests", "host-up1,lan-down8,lan-pp1,lan-udp"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	b.isolation = "none: a test"
	b.log = t.Output()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	b.build(ctx, dir)
	before := networkHere(t)
	var w bytes.Buffer
	if err := b.run(ctx, self, dir, &w); err != nil {
		t.Fatal(err)
	}
	if after := tree(processes(), os.Getpid()); len(after) != 1 {
		t.Errorf("processes are left: %+v", after)
	}
	if after := networkHere(t); after != before {
		t.Errorf("here are now %s, before %s", after, before)
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
		_, name, _ := strings.Cut(s.Test, "-")
		key := map[string]string{"up1": "gbit_s", "down8": "gbit_s", "pp1": "p50_us", "udp": "mbit_s"}[name]
		if s.Err != "" || !(s.Values[key] > 0) {
			t.Errorf("%s %s: %v %s", s.Peer, s.Test, s.Values, s.Err)
		}
	}
	if want := 3*3 + 2; len(r.Samples) != want {
		t.Errorf("%d samples, want %d", len(r.Samples), want)
	}
	for _, want := range []string{"tun, Gbit/s ÷ redirect", "tun ÷ kernel"} {
		if !strings.Contains(w.String(), want) {
			t.Errorf("no %q in\n%s", want, w.String())
		}
	}
}
