package tundev

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// lab is a network namespace of the test with an interface eth0, whose peer is in another, with 10.77.0.2/24 and
// fd77::2/64 and default routes through it.
type lab struct {
	t          *testing.T
	name, peer string
	dir        string // of records
}

func newLab(t *testing.T) *lab {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "ip")
	l := &lab{t: t, name: fmt.Sprintf("sluice-tundev-%d", os.Getpid()), dir: t.TempDir()}
	l.peer = l.name + "-peer"
	t.Cleanup(func() {
		for _, ns := range []string{l.name, l.peer} {
			exec.Command("ip", "netns", "del", ns).Run()
		}
	})
	ip(t, "netns", "add", l.name)
	ip(t, "netns", "add", l.peer)
	for _, setting := range []string{"ipv4/ip_forward 1", "ipv6/conf/all/forwarding 1", "ipv6/conf/default/accept_dad 0", "ipv6/conf/all/accept_dad 0"} {
		l.set(setting)
	}
	ip(t, "-n", l.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", l.peer)
	for i, ns := range []string{l.peer, l.name} {
		for _, dev := range []string{"lo", "eth0"} {
			ip(t, "-n", ns, "link", "set", dev, "up")
		}
		ip(t, "-n", ns, "addr", "add", fmt.Sprintf("10.77.0.%d/24", i+1), "dev", "eth0")
		ip(t, "-n", ns, "addr", "add", fmt.Sprintf("fd77::%d/64", i+1), "dev", "eth0", "nodad")
	}
	ip(t, "-n", l.name, "route", "add", "default", "via", "10.77.0.1")
	ip(t, "-n", l.name, "route", "add", "default", "via", "fd77::1")
	ip(t, "-n", l.name, "route", "add", "10.99.0.0/16", "via", "10.77.0.1")
	proxytest.Until(t, "the kernel has set up eth0", func() bool {
		return strings.Contains(ip(t, "-n", l.name, "link", "show", "eth0"), "state UP") &&
			strings.Contains(ip(t, "-n", l.name, "-6", "route", "show", "table", "local"), "local fe80")
	})
	return l
}

// set sets a value below /proc/sys/net.
func (l *lab) set(setting string) {
	l.t.Helper()
	name, value, _ := strings.Cut(setting, " ")
	l.sh("echo " + value + " >/proc/sys/net/" + name)
}

// sh runs a shell's command line in the namespace.
func (l *lab) sh(script string) string {
	l.t.Helper()
	return strings.TrimSpace(ip(l.t, "netns", "exec", l.name, "sh", "-c", script))
}

func ip(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("ip", args...)
	var complaints strings.Builder // also of namespaces that others are just removing
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, complaints.String())
	}
	return string(out)
}

// dump returns all that a Setup could change, as ip prints it.
func (l *lab) dump() string {
	l.t.Helper()
	var b strings.Builder
	for _, what := range []string{"rule", "-6 rule", "route show table all", "-6 route show table all", "addr", "link"} {
		fmt.Fprintf(&b, "== %s\n%s", what, ip(l.t, append([]string{"-n", l.name}, strings.Fields(what)...)...))
	}
	return b.String()
}

func (l *lab) up(s Setup) *Link {
	l.t.Helper()
	link, err := l.tryUp(s)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { link.Device.Close(); link.Down() })
	return link
}

func (l *lab) tryUp(s Setup) (*Link, error) {
	s.Namespace, s.dir = l.name, l.dir
	return s.Up()
}

func (l *lab) same(before string) {
	l.t.Helper()
	if after := l.dump(); after != before {
		l.t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// noRecords fails unless all records are gone.
func (l *lab) noRecords() {
	l.t.Helper()
	if left, _ := filepath.Glob(l.dir + "/*"); len(left) > 0 {
		l.t.Errorf("records are left: %v", left)
	}
}

// way returns the interface and the source address that the kernel chooses.
func (l *lab) way(flow string) string {
	l.t.Helper()
	args := append([]string{"-n", l.name, "route", "get"}, strings.Fields(flow)...)
	out, err := exec.Command("ip", args...).CombinedOutput()
	words := strings.Fields(string(out))
	if err != nil {
		return "error"
	}
	for i, w := range words {
		if w == "dev" {
			return words[i+1]
		}
	}
	return string(out)
}

func TestWays(t *testing.T) {
	type ways map[string]string
	for _, tt := range []struct {
		name  string
		setup Setup
		want  ways
	}{
		{"everything", Setup{Marks: []uint32{DefaultMark, 7}, DNS: true}, ways{
			"203.0.113.1":                                   "sluice0",
			"2001:db8::1":                                   "sluice0",
			"203.0.113.1 mark 0x736c0000":                   "eth0",
			"2001:db8::1 mark 0x736c0000":                   "eth0",
			"203.0.113.1 mark 7":                            "eth0",
			"203.0.113.1 mark 6":                            "sluice0",
			"203.0.113.1 from 10.77.0.2":                    "eth0", // connected before, or the answer to who connected
			"2001:db8::1 from fd77::2":                      "eth0",
			"203.0.113.1 from 198.18.0.1":                   "sluice0",
			"2001:db8::1 from fd5c:1e7a:b3d2:198::1":        "sluice0",
			"203.0.113.1 from 10.77.0.9 iif eth0":           "sluice0", // forwarded
			"2001:db8::1 from fd77::9 iif eth0":             "sluice0",
			"203.0.113.1 from 192.0.2.1 iif sluice0":        "eth0", // not in circles
			"10.77.0.9":                                     "eth0", // the LAN
			"fd77::9":                                       "eth0",
			"10.99.1.1":                                     "eth0", // a route that was there
			"10.77.0.1 ipproto udp sport 1000 dport 53":     "sluice0",
			"10.77.0.1 ipproto tcp sport 1000 dport 53":     "sluice0",
			"fd77::1 ipproto udp sport 1000 dport 53":       "sluice0",
			"10.77.0.1 ipproto udp sport 1000 dport 5353":   "eth0",
			"10.77.0.1 mark 7 ipproto udp sport 9 dport 53": "eth0",
			"127.0.0.1":                                     "lo",
			"10.77.0.2":                                     "lo",
			"198.18.0.1":                                    "lo",
			"198.18.0.2":                                    "sluice0",
			"198.19.255.255":                                "sluice0",
			"224.0.0.251":                                   "eth0",
			"255.255.255.255":                               "eth0",
			"ff02::fb":                                      "eth0",
		}},
		{"exclude", Setup{Exclude: prefixesOf("203.0.113.0/24", "2001:db8::/32", "10.77.0.53")}, ways{
			"203.0.113.1": "eth0",
			"203.0.112.1": "sluice0",
			"2001:db8::1": "eth0",
			"2001:db9::1": "sluice0",
			"10.77.0.1 ipproto udp sport 1000 dport 53": "eth0", // DNS is not asked for
		}},
		{"exclude a name server", Setup{Exclude: prefixesOf("10.77.0.53"), DNS: true}, ways{
			"10.77.0.53 ipproto udp sport 1000 dport 53": "eth0",
			"10.77.0.1 ipproto udp sport 1000 dport 53":  "sluice0",
		}},
		{"include", Setup{Include: prefixesOf("203.0.113.0/24", "2001:db8::/32", "10.77.0.128/25", "10.99.0.0/16"),
			Exclude: prefixesOf("203.0.113.128/25", "10.99.0.0/24")}, ways{
			"203.0.113.1":              "sluice0",
			"203.0.113.129":            "eth0",
			"203.0.112.1":              "eth0",
			"2001:db8::1":              "sluice0",
			"2001:db9::1":              "eth0",
			"10.77.0.9":                "eth0",
			"10.77.0.129":              "sluice0", // a part of the LAN
			"10.99.0.1":                "eth0",
			"10.99.1.1":                "sluice0", // whatever other routes are there
			"203.0.112.1 dport 53":     "eth0",
			"203.0.113.1 mark 7":       "sluice0",
			"192.0.2.1 from 10.77.0.2": "eth0",
		}},
		{"a network twice", Setup{Include: prefixesOf("203.0.113.0/24", "203.0.113.0/24", "2001:db8::/32", "2001:db8::/32"),
			Exclude: prefixesOf("203.0.113.7", "203.0.113.7", "224.0.0.0/4")}, ways{
			"203.0.113.1": "sluice0",
			"203.0.113.7": "eth0",
			"2001:db8::1": "sluice0",
			"224.0.0.251": "eth0",
		}},
		{"include, and DNS", Setup{Include: prefixesOf("198.18.0.0/15"), DNS: true}, ways{
			"203.0.113.1": "eth0",
			"198.19.0.1":  "sluice0",
			"203.0.113.1 ipproto udp sport 1000 dport 53": "sluice0",
			"2001:db8::1 ipproto tcp sport 1000 dport 53": "sluice0",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			l := newLab(t)
			before := l.dump()
			link := l.up(tt.setup)
			for flow, want := range tt.want {
				if got := l.way(flow); got != want {
					t.Errorf("%s goes by %s, want %s", flow, got, want)
				}
			}
			if t.Failed() {
				t.Log(l.dump())
			}
			if err := link.Drain(); err != nil {
				t.Error(err)
			}
			for flow, want := range map[string]string{"198.51.100.1": "eth0", "198.51.100.1 from 198.18.0.1": "sluice0",
				"2001:db9::1": "eth0", "2001:db9::1 from fd5c:1e7a:b3d2:198::1": "sluice0"} {
				if got := l.way(flow); got != want {
					t.Errorf("drained, %s goes by %s, want %s", flow, got, want)
				}
			}
			if err := link.Device.Close(); err != nil {
				t.Error(err)
			}
			if err := link.Down(); err != nil {
				t.Error(err)
			}
			if err := link.Down(); err != nil {
				t.Errorf("the second time: %v", err)
			}
			l.same(before)
			l.noRecords()
		})
	}
}

// TestExcludeAFamily: all of IPv6 may be left alone, and IPv4 taken in.
func TestExcludeAFamily(t *testing.T) {
	l := newLab(t)
	l.up(Setup{Exclude: prefixesOf("::/0"), DNS: true})
	for flow, want := range map[string]string{"203.0.113.1": "sluice0", "2001:db8::1": "eth0",
		"fd77::1 ipproto udp sport 1000 dport 53": "eth0"} {
		if got := l.way(flow); got != want {
			t.Errorf("%s goes by %s, want %s", flow, got, want)
		}
	}
}

func prefixesOf(list ...string) (all []netip.Prefix) {
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a := netip.MustParseAddr(s)
			p = netip.PrefixFrom(a, a.BitLen())
		}
		all = append(all, p)
	}
	return all
}

// crash leaves what a killed process leaves: no device and no lock, but rules, routes and the record.
func (l *lab) crash(link *Link) {
	l.t.Helper()
	if err := link.Device.Close(); err != nil {
		l.t.Fatal(err)
	}
	link.network.h.Close()
	link.ns.close()
	link.state.file.Close()
	link.down = true
	proxytest.Until(l.t, "the device is gone", func() bool { return !strings.Contains(ip(l.t, "-n", l.name, "link"), ": sluice0:") })
}

func TestCrashThenClean(t *testing.T) {
	proxytest.NoLeaks(t)
	l := newLab(t)
	foreign := []string{"pref", "7105", "to", "192.0.2.0/24", "lookup", "main"}
	for _, family := range []string{"-4", "-6"} {
		if family == "-6" {
			foreign[3] = "2001:db8::/32"
		}
		ip(t, append([]string{"-n", l.name, family, "rule", "add"}, foreign...)...)
	}
	before := l.dump()
	l.crash(l.up(Setup{DNS: true, Marks: []uint32{DefaultMark}, Exclude: prefixesOf("203.0.113.0/24", "2001:db8::/32")}))
	if l.dump() == before {
		t.Fatal("nothing was left behind")
	}
	if got := l.way("198.51.100.1"); got != "eth0" { // the machine goes on
		t.Errorf("after the crash, all goes by %s", got)
	}
	c, err := clean(l.name, l.dir)
	if err != nil || !c.Any() {
		t.Errorf("%+v, %v", c, err)
	}
	l.same(before)
	l.noRecords()
	if c, err := clean(l.name, l.dir); err != nil || c.Any() {
		t.Errorf("the second time: %+v, %v", c, err)
	}
	l.noRecords()
}

func TestCrashThenUp(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	l.crash(l.up(Setup{DNS: true, Include: prefixesOf("203.0.113.0/24"), Exclude: prefixesOf("203.0.113.5")}))
	link := l.up(Setup{Name: "other0", Marks: []uint32{9}})
	if got := l.way("198.51.100.1"); got != "other0" {
		t.Errorf("all goes by %s", got)
	}
	link.Device.Close()
	if err := link.Down(); err != nil {
		t.Error(err)
	}
	l.same(before)
	l.noRecords()
}

// TestCrashWithoutRecord: what bears our numbers is ours, even if nobody has written it down.
func TestCrashWithoutRecord(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	for name, damage := range map[string]func(string) error{
		"removed": os.Remove,
		"torn":    func(f string) error { return os.Truncate(f, 40) },
	} {
		l.crash(l.up(Setup{DNS: true, Exclude: prefixesOf("203.0.113.5", "2001:db8::1")}))
		records, _ := filepath.Glob(l.dir + "/*")
		if len(records) != 1 {
			t.Fatalf("records: %v", records)
		}
		if err := damage(records[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := clean(l.name, l.dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		l.same(before)
		l.noRecords()
	}
}

// TestCrashTwice: the record is of another crash than the one that left the rules, as when the namespace was entered by
// its name and then without.
func TestCrashTwice(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	l.crash(l.up(Setup{}))
	first, again := l.dir, t.TempDir()
	l.dir = again
	l.crash(l.up(Setup{Marks: []uint32{7}, Include: prefixesOf("203.0.113.0/24"), DNS: true}))
	l.dir = first
	link := l.up(Setup{Name: "sluice1"})
	link.Device.Close()
	if err := link.Down(); err != nil {
		t.Error(err)
	}
	l.same(before)
	l.noRecords()
}

// TestNothingElseIsRemoved: a record is only believed as far as the kernel bears it out.
func TestNothingElseIsRemoved(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	ns, err := openNamespace(l.name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.close()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver 192.0.2.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(record{Namespace: l.name, Rules: []rule{{Priority: 32766, Table: unix.RT_TABLE_MAIN}},
		Files: []madeFile{{Path: file, Content: "something else"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, ns.record()), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := clean(l.name, l.dir); err != nil || c.Any() {
		t.Errorf("%+v, %v", c, err)
	}
	l.same(before)
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestRecordIsPrivate(t *testing.T) {
	l := newLab(t)
	l.up(Setup{})
	records, _ := filepath.Glob(l.dir + "/*")
	st, err := os.Stat(records[0])
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

func TestSecondInstance(t *testing.T) {
	l := newLab(t)
	link := l.up(Setup{})
	up := l.dump()
	for name, dir := range map[string]string{"the same records": l.dir, "records of its own": t.TempDir()} {
		l.dir = dir
		if _, err := l.tryUp(Setup{Name: "sluice1"}); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := clean(l.name, dir); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v", name, err)
		}
	}
	l.same(up)
	link.Device.Close()
	if err := link.Down(); err != nil {
		t.Error(err)
	}
}

// TestOneNetworkTwoNames: who opens a network by its name and who is in it keep each other out from the first moment on, when
// there is no device yet that would tell.
func TestOneNetworkTwoNames(t *testing.T) {
	l := newLab(t)
	named, err := openLink(l.name, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer named.Down()
	err = named.ns.do(func() error {
		inside, err := openLink("", l.dir)
		if err == nil {
			inside.Down()
		}
		return err
	})
	if !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
}

func TestDeviceDeleted(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	link := l.up(Setup{Exclude: prefixesOf("203.0.113.0/24")})
	ip(t, "-n", l.name, "link", "del", "sluice0")
	if _, err := link.Device.ReadPacket(new(Header), [][]byte{make([]byte, PacketMax)}); !errors.Is(err, ErrGone) {
		t.Errorf("reading: %v", err)
	}
	link.Device.Close()
	if err := link.Down(); err != nil {
		t.Error(err)
	}
	l.same(before)
}

func TestIPv6SwitchedOff(t *testing.T) {
	l := newLab(t)
	l.set("ipv6/conf/default/disable_ipv6 1") // for new interfaces only
	link := l.up(Setup{})
	if got := l.way("2001:db8::1"); got != "sluice0" {
		t.Errorf("IPv6 goes by %s", got)
	}
	link.Device.Close()
	link.Down()

	l.set("ipv6/conf/all/disable_ipv6 1")
	before := l.dump()
	link = l.up(Setup{Include: prefixesOf("2001:db8::/32", "203.0.113.0/24")})
	if len(link.Addrs) != 1 || l.way("203.0.113.1") != "sluice0" || strings.Contains(ip(t, "-n", l.name, "-6", "rule"), "71") {
		t.Errorf("addresses %v\n%s", link.Addrs, l.dump())
	}
	link.Device.Close()
	link.Down()
	l.same(before)
}

// TestStrictFilter: rp_filter of the device is loosened, since answers to DNS questions come from hosts on other interfaces.
func TestStrictFilter(t *testing.T) {
	l := newLab(t)
	l.set("ipv4/conf/all/rp_filter 1")
	l.up(Setup{})
	if got := l.sh("cat /proc/sys/net/ipv4/conf/sluice0/rp_filter /proc/sys/net/ipv4/conf/all/rp_filter"); got != "2\n1" {
		t.Errorf("rp_filter is %q", got)
	}
}

func TestAddressTaken(t *testing.T) {
	l := newLab(t)
	ip(t, "-n", l.name, "addr", "add", "198.18.0.2/30", "dev", "eth0")
	ip(t, "-n", l.name, "addr", "add", "198.18.0.5", "dev", "eth0")
	ip(t, "-n", l.name, "addr", "add", "198.18.200.1/15", "dev", "eth0") // larger than all choices
	link := l.up(Setup{})
	if got := link.Addrs[0].String(); got != "198.18.0.9/30" {
		t.Errorf("the device has %s", got)
	}
}

// TestBadInput: each error names what is wrong, and nothing is made.
func TestBadInput(t *testing.T) {
	proxytest.NoLeaks(t)
	l := newLab(t)
	ip(t, "-n", l.name, "route", "add", "192.0.2.0/24", "via", "10.77.0.1", "table", "7101")
	foreign := l.dump()
	if _, err := l.tryUp(Setup{}); err == nil || !strings.Contains(err.Error(), "routing table 7101 is in use") {
		t.Errorf("foreign table: %v", err)
	}
	l.same(foreign)
	ip(t, "-n", l.name, "route", "flush", "table", "7101")
	before := l.dump()
	for want, s := range map[string]Setup{
		"an interface eth0 is there already": {Name: "eth0"},
		"too long for the name":              {Name: "sluice0123456789"},
		"MTU of 1279":                        {MTU: 1279},
		"there is no network namespace":      {Namespace: "no-such-namespace"},
		"is not the name of a network":       {Namespace: "../x"},
		"ip netns add sluice-no-namespace":   {Namespace: "sluice-no-namespace"},
	} {
		s.dir = l.dir
		if s.Namespace == "" {
			s.Namespace = l.name
		}
		link, err := s.Up()
		if err == nil {
			link.Device.Close()
			link.Down()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
	l.same(before)
	l.noRecords()
	for name, mode := range map[string]fs.FileMode{"writable by all": 0o777, "writable by the group": 0o770} {
		if err := os.Chmod(l.dir, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := l.tryUp(Setup{}); err == nil || !strings.Contains(err.Error(), "only its owner") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOwnNamespace: a namespace by name is not the one that we are in, where our own connections would come back to us.
func TestOwnNamespace(t *testing.T) {
	l := newLab(t)
	ns, err := openNamespace(l.name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.close()
	err = ns.do(func() error {
		_, err := (&Setup{Namespace: l.name, dir: l.dir}).Up()
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "is the one that this program runs in") {
		t.Error(err)
	}
}

func TestNoRights(t *testing.T) {
	err := explainOpen(fmt.Errorf("tundev: make: %w", unix.EPERM))
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "sluice exec") {
		t.Error(err)
	}
}

// TestRecordRemoved: that somebody has removed our record is no failure.
func TestRecordRemoved(t *testing.T) {
	l := newLab(t)
	before := l.dump()
	link := l.up(Setup{})
	records, _ := filepath.Glob(l.dir + "/*")
	if err := os.Remove(records[0]); err != nil {
		t.Fatal(err)
	}
	link.Device.Close()
	if err := link.Down(); err != nil {
		t.Error(err)
	}
	l.same(before)
}
