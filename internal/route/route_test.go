package route_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/process"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/route"
)

// way is a dialer that is only told from others.
type way string

func (w way) DialStream(context.Context, proxy.Addr) (net.Conn, error) {
	return nil, errors.New(string(w))
}

func targets(t testing.TB, list ...string) *route.Targets {
	t.Helper()
	s := new(route.Targets)
	for _, e := range list {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func ports(t testing.TB, list ...string) (all []route.Ports) {
	t.Helper()
	for _, s := range list {
		p, err := route.ParsePorts(s)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func processes(t testing.TB, list ...string) (all []route.Processes) {
	t.Helper()
	for _, s := range list {
		p, err := route.ParseProcesses(s)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// owners stands in for the system: every client is owner.
type owners struct {
	owner process.Owner
	asked int
}

func (o *owners) Owner(netip.AddrPort, netip.AddrPort, string) (process.Owner, bool) {
	o.asked++
	return o.owner, o.owner != process.Owner{}
}

func TestRules(t *testing.T) {
	r := &route.Router{
		Rules: []route.Rule{
			{To: targets(t, "10.9.0.0/16"), Name: "net"},
			{To: targets(t, "10.0.0.0/8", ".corp.example", "2001:db8::/32"), Ports: ports(t, "443", "8000-8999"), Name: "corp"},
			{Network: "udp", Ports: ports(t, "53"), Name: "dns"},
			{Inbounds: []string{"guests", "kids"}, Name: "slow"},
			{Users: []string{"ann"}, Name: "ann"},
			{From: route.Networks([]netip.Prefix{netip.MustParsePrefix("192.168.7.0/24"), netip.MustParsePrefix("fe80::/10")}), Name: "lan"},
			{Ports: ports(t, "25"), Processes: processes(t, "/usr/bin/mail", "curl"), Name: "mail"},
		},
		Default: proxy.Static{Name: "default", Dialer: way("default")},
		Owners:  &owners{owner: process.Owner{UID: 1, PID: 2, Path: "/usr/bin/curl"}},
	}
	client := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	for _, tt := range []struct {
		what string
		f    proxy.Flow
		want string
	}{
		{"the first that matches wins", proxy.Flow{Dst: proxy.TCP("10.9.1.1", 443)}, "net"},
		{"network and port", proxy.Flow{Dst: proxy.TCP("10.1.1.1", 443)}, "corp"},
		{"the wrong port", proxy.Flow{Dst: proxy.TCP("10.1.1.1", 80)}, "default"},
		{"a range's first", proxy.Flow{Dst: proxy.TCP("x.corp.example", 8000)}, "corp"},
		{"a range's last", proxy.Flow{Dst: proxy.TCP("corp.example.", 8999)}, "corp"},
		{"behind a range", proxy.Flow{Dst: proxy.TCP("corp.example", 9000)}, "default"},
		{"IPv6", proxy.Flow{Dst: proxy.TCP("2001:db8::1", 443)}, "corp"},
		{"IPv4 in IPv6", proxy.Flow{Dst: proxy.TCP("::ffff:10.1.1.1", 443)}, "corp"},
		{"a short form", proxy.Flow{Dst: proxy.TCP("10.1", 443)}, "corp"},
		{"UDP", proxy.Flow{Dst: proxy.UDP("192.0.2.1", 53)}, "dns"},
		{"TCP", proxy.Flow{Dst: proxy.TCP("192.0.2.1", 53)}, "default"},
		{"inbound", proxy.Flow{Inbound: "kids", Dst: proxy.TCP("x", 1)}, "slow"},
		{"user", proxy.Flow{User: "ann", Dst: proxy.TCP("x", 1)}, "ann"},
		{"client", proxy.Flow{Client: client("192.168.7.9:1"), Dst: proxy.TCP("x", 1)}, "lan"},
		{"client IPv4 in IPv6", proxy.Flow{Client: client("[::ffff:192.168.7.9]:1"), Dst: proxy.TCP("x", 1)}, "lan"},
		{"client with a zone", proxy.Flow{Client: client("[fe80::1%eth0]:1"), Dst: proxy.TCP("x", 1)}, "lan"},
		{"another client", proxy.Flow{Client: client("192.168.8.9:1"), Dst: proxy.TCP("x", 1)}, "default"},
		{"process", proxy.Flow{Client: client("127.0.0.1:1"), Dst: proxy.TCP("x", 25)}, "mail"},
		{"no client's address", proxy.Flow{Dst: proxy.TCP("x", 25)}, "default"},
		{"a Unix socket", proxy.Flow{Dst: proxy.Addr{Network: "unix", Host: "corp.example"}}, "default"},
		{"nothing", proxy.Flow{}, "default"},
	} {
		if name, _ := r.Route(tt.f); name != tt.want {
			t.Errorf("%s: %s, want %s", tt.what, name, tt.want)
		}
	}
}

// TestRouteReturnsTheDialerItself: what is around it would hide that it is a [proxy.Starter].
func TestRouteReturnsTheDialerItself(t *testing.T) {
	r := &route.Router{
		Rules:   []route.Rule{{Ports: ports(t, "1"), Name: "a", Dialer: way("a")}},
		Default: proxy.Static{Name: "b", Dialer: way("b")},
	}
	for port, want := range map[uint16]way{1: "a", 2: "b"} {
		name, d, ok := r.RouteNow(proxy.Flow{Dst: proxy.TCP("x", port)})
		if name != string(want) || d != want || !ok {
			t.Errorf("port %d: %s, %v, %v", port, name, d, ok)
		}
	}
}

// TestProcessIsAskedForLate: once, only where it decides, and not by a caller that must not block.
func TestProcessIsAskedForLate(t *testing.T) {
	o := &owners{owner: process.Owner{UID: 1000, PID: 1, Path: "/bin/b"}}
	r := &route.Router{
		Rules: []route.Rule{
			{Ports: ports(t, "1"), Name: "port"},
			{Ports: ports(t, "2"), Processes: processes(t, "a"), Name: "a"},
			{Ports: ports(t, "2"), Processes: processes(t, "b"), Name: "b"},
		},
		Default: proxy.Static{Name: "default"},
		Owners:  o,
	}
	flow := func(port uint16) proxy.Flow {
		return proxy.Flow{Client: netip.MustParseAddrPort("127.0.0.1:9"), Dst: proxy.TCP("x", port)}
	}
	for _, port := range []uint16{1, 3} {
		if _, _, ok := r.RouteNow(flow(port)); !ok {
			t.Errorf("port %d: the process was wanted", port)
		}
		r.Route(flow(port))
	}
	if o.asked != 0 {
		t.Error("the process was asked for where it does not matter")
	}
	if name, _, ok := r.RouteNow(flow(2)); ok {
		t.Errorf("%s was chosen without the process", name)
	}
	if name, _ := r.Route(flow(2)); name != "b" || o.asked != 1 {
		t.Errorf("%s, asked %d times", name, o.asked)
	}
	if name, _, ok := r.RouteNow(flow(2)); ok {
		t.Errorf("%s was chosen by who had the port before", name)
	}
}

func TestTargets(t *testing.T) {
	set := targets(t, "exact.example", ".both.example", "*.Below.Example.", "10.0.0.0/8", "192.0.2.7", "2001:DB8::/32",
		"::ffff:198.51.100.1", "com.", "*.internal")
	for host, want := range map[string]bool{
		"exact.example": true, "EXACT.example.": true, "x.exact.example": false, "xexact.example": false,
		"both.example": true, "a.both.example": true, "a.b.BOTH.example.": true, "notboth.example": false,
		"below.example": false, "x.below.example": true, ".below.example": true, "below.example.x": false,
		"com": true, "example.com": false, "db.internal": true, "internal": false,
		"10.255.255.255": true, "11.0.0.0": false, "192.0.2.7": true, "192.0.2.8": false, "192.0.2.7.": true,
		"2001:db8::1": true, "2001:db9::1": false, "2001:db8::1%eth0": true, "::ffff:10.1.1.1": true, "198.51.100.1": true,
		"10.1": true, "0xa.1": true, "012.1": true, "0xa000001": true, "167772161": true, "11.1": false,
		"10.256.1": false, "10.1.2.3.4": false, "10.1_0": false, "0b1010.1": false, "0o12.1": false, "4294967296": false,
		"": false, ".": false, "..": false, "10.0.0.0/8": false, ":": false,
		strings.Repeat("a", 300): false, strings.Repeat("a.", 122) + "both.example": false, // 256 bytes
		strings.Repeat("a.", 121) + "both.example.": true, strings.Repeat("a", 242) + ".both.example.": true,
	} {
		if got := set.Contains(host); got != want {
			t.Errorf("%.40q: %v, want %v", host, got, want)
		}
	}
	if set.Size() != 9 {
		t.Errorf("size %d", set.Size())
	}
}

// TestTargetsUnspecified checks that a rule for loopback is not evaded by the address that means this machine, too.
func TestTargetsUnspecified(t *testing.T) {
	for entry, hosts := range map[string][2][]string{
		"127.0.0.0/8": {{"127.0.0.1", "0.0.0.0", "0", "0x0", "::ffff:0.0.0.0", "0.0.0.0."}, {"::", "::1", "0.0.0.1"}},
		"::1":         {{"::1", "::", "::%lo"}, {"0.0.0.0", "::2"}},
		"0.0.0.0":     {{"0.0.0.0"}, {"127.0.0.1", "::"}},
	} {
		set := targets(t, entry)
		for i, want := range []bool{true, false} {
			for _, host := range hosts[i] {
				if got := set.Contains(host); got != want {
					t.Errorf("%s: %s: %v, want %v", entry, host, got, want)
				}
			}
		}
	}
}

func TestTargetErrors(t *testing.T) {
	for entry, want := range map[string]string{
		"10.0.0.1/8":              `"10.0.0.1/8" has bits behind the prefix: write 10.0.0.0/8, or 10.0.0.1 for one address`,
		"10.0.0.0/33":             `"10.0.0.0/33" is not a network (as in 10.0.0.0/8)`,
		"::ffff:10.0.0.0/104":     `"::ffff:10.0.0.0/104" is an IPv4 network in IPv6 form: write it as IPv4`,
		"fe80::1%eth0":            `"fe80::1%eth0": zones cannot be told apart here: leave %eth0 out`,
		"10.0.0":                  `"10.0.0" is no IP address, and no name ends in a number`,
		"0x7f.1":                  `"0x7f.1" is no IP address, and no name ends in a number`,
		"https://example.com/":    `"https://example.com/" is a URL: write its host alone`,
		"example.com:80":          `"example.com:80" is no name and no IP address (a port has a condition of its own)`,
		"*":                       `"*" is everything: leave the condition out`,
		"ads*.example.com":        `"ads*.example.com": a * can only stand for all in front of a name (as in *.example.com)`,
		"*.*.example.com":         `"*.*.example.com": a * can only stand for all in front of a name (as in *.example.com)`,
		"bücher.example":          `"bücher.example": write names with other than ASCII letters as they are asked for (xn--...)`,
		"":                        `"" is not a name (as in example.com, .example.com, *.example.com)`,
		".":                       `"." is not a name (as in example.com, .example.com, *.example.com)`,
		"a..b":                    `"a..b" is not a name (as in example.com, .example.com, *.example.com)`,
		"||ads.example^":          `"||ads.example^" is not a name (as in example.com, .example.com, *.example.com)`,
		strings.Repeat("a.", 128): `"` + strings.Repeat("a.", 28) + `a..." is longer than a name can be`,
	} {
		err := new(route.Targets).Add(entry)
		if err == nil || err.Error() != want {
			t.Errorf("%.40q: %v\nwant %s", entry, err, want)
		}
	}
}

func TestLists(t *testing.T) {
	set := new(route.Targets)
	list := "\uFEFF# ads\r\n\r\nAds.Example # here\r\n10.0.0.0/8\n  .tracker.example  "
	if errs := set.AddList("list", []byte(list)); errs != nil {
		t.Fatal(errs)
	}
	for _, host := range []string{"ads.example", "10.1.1.1", "a.tracker.example"} {
		if !set.Contains(host) {
			t.Errorf("%s is not in it", host)
		}
	}
	err := errors.Join(set.AddList("dir/list.txt", []byte("good.example\n\n0.0.0.0 ads.example\n# -\n1.2.3\n"))...)
	want := `dir/list.txt:3: "0.0.0.0 ads.example" is more than one word: a line of a list is one name or network (the names of a hosts file, without addresses)
dir/list.txt:5: "1.2.3" is no IP address, and no name ends in a number`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	if err := errors.Join(set.AddList("none", []byte("# nothing\n\n"))...); err == nil || err.Error() != "none: nothing in it" {
		t.Error(err)
	}
	if errs := set.AddList("bad", []byte(strings.Repeat("?\n", 1000))); len(errs) != 11 {
		t.Errorf("%d complaints", len(errs))
	}
}

func TestPorts(t *testing.T) {
	for s, want := range map[string]string{
		"": "neither", "0": "neither", "x": "neither", "1-": "neither", "-1": "neither", "65536": "neither", "1-2-3": "neither",
		"0-5": "neither", "+1": "neither", "9-8": "ends before it begins",
	} {
		if _, err := route.ParsePorts(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if p := ports(t, "1", "1-65535", "443 - 444"); p[0] != (route.Ports{First: 1, Last: 1}) ||
		p[1] != (route.Ports{First: 1, Last: 65535}) || p[2] != (route.Ports{First: 443, Last: 444}) {
		t.Error(p)
	}
}

func TestProcesses(t *testing.T) {
	o := process.Owner{UID: 1000, PID: 7, Path: "/usr/bin/curl", Cgroup: "/user.slice/x.service"}
	for s, want := range map[string]bool{
		"curl": true, "url": false, "curl2": false, "bin": false, "/usr/bin/curl": true, "/bin/curl": false,
		"uid:1000": true, "uid:0": false, "cgroup:/user.slice": true, "cgroup:/user.slice/x.service/": true, "cgroup:/user.slice/x": false,
		"cgroup:/user.slice/x.service/y": false,
	} {
		p := processes(t, s)[0]
		if got := p.Contains(&o); got != want {
			t.Errorf("%s: %v", s, got)
		}
		if unknown := (process.Owner{UID: 5}); p.Contains(&unknown) {
			t.Errorf("%s is a process that is not known", s)
		}
	}
	for _, s := range []string{"", "/", "uid:", "uid:ann", "uid:-1", "cgroup:x", "cgroup:/", "name:x", "bin/curl"} {
		if p, err := route.ParseProcesses(s); err == nil {
			t.Errorf("%q is %+v", s, p)
		}
	}
}

// big returns a router with a hundred thousand names and as many networks in front of its default.
func big(t testing.TB) *route.Router {
	names, networks := bigLists()
	set := new(route.Targets)
	for _, list := range [][]byte{names, networks} {
		if errs := set.AddList("list", list); errs != nil {
			t.Fatal(errs)
		}
	}
	return &route.Router{
		Rules: []route.Rule{
			{To: targets(t, ".corp.example", "10.0.0.0/8"), Ports: ports(t, "443"), Name: "corp"},
			{To: set, Name: "big"},
			{Processes: processes(t, "curl"), Name: "curl"},
		},
		Default: proxy.Static{Name: "default", Dialer: way("default")},
		Owners:  &owners{owner: process.Owner{UID: 1}, asked: 1},
	}
}

var bigFlows = map[string]proxy.Flow{
	"default": {Client: netip.MustParseAddrPort("127.0.0.1:9"), Dst: proxy.TCP("WWW.some.long.name.of.an.origin.example.org.", 443)},
	"big":     {Client: netip.MustParseAddrPort("127.0.0.1:9"), Dst: proxy.TCP("a.b.ads77777.tracker7.example", 443)},
	"corp":    {Client: netip.MustParseAddrPort("[::1]:9"), Dst: proxy.TCP("10.2.3.4", 443)},
}

func TestRouteAllocatesNothing(t *testing.T) {
	r := big(t)
	flows := bigFlows
	flows["big "] = proxy.Flow{Dst: proxy.TCP("2001:db8:0:1001::1", 1)}
	for want, f := range flows {
		want = strings.TrimSpace(want)
		if name, _ := r.Route(f); name != want {
			t.Errorf("%v: %s, want %s", f.Dst, name, want)
		}
		for what, choose := range map[string]func(){"Route": func() { r.Route(f) }, "RouteNow": func() { r.RouteNow(f) }} {
			if n := testing.AllocsPerRun(100, choose); n != 0 {
				t.Errorf("%s(%v) allocates %v times", what, f.Dst, n)
			}
		}
	}
}

func FuzzTargets(f *testing.F) {
	for _, s := range []string{"example.com", ".Example.com.", "*.x", "10.0.0.0/8", "::1", "fe80::1%x", "1.2", "a..b", "\xff", "*"} {
		f.Add(s, "www.example.com")
	}
	f.Add(".a", "0x.a")
	f.Add("0X0", "0x0")
	f.Fuzz(func(t *testing.T, entry, host string) {
		set := new(route.Targets)
		err := set.Add(entry)
		if (err == nil) != (set.Size() == 1) {
			t.Fatalf("%q: %v and size %d", entry, err, set.Size())
		}
		if set.Contains(host) != set.Contains(strings.ToUpper(strings.TrimSuffix(host, "."))) && isASCII(host) && !strings.HasSuffix(host, "..") &&
			!strings.Contains(host, "%") {
			t.Errorf("%q holds %q or not, by its case", entry, host)
		}
		if err != nil {
			if set.Contains(host) {
				t.Errorf("%q is wrong (%v) and holds %q", entry, err, host)
			}
			return
		}
		name := strings.TrimPrefix(strings.TrimPrefix(entry, "*"), ".")
		if strings.HasPrefix(entry, "*.") || strings.HasPrefix(entry, ".") {
			name = "x." + name
		}
		if !strings.Contains(entry, "/") && len(name) <= 253 && !set.Contains(name) {
			t.Errorf("%q does not hold %q", entry, name)
		}
	})
}

func FuzzList(f *testing.F) {
	f.Add([]byte("a.example\n# x\n10.0.0.0/8 # y\r\n\xef\xbb\xbf\n0.0.0.0 b"))
	f.Fuzz(func(t *testing.T, list []byte) {
		set := new(route.Targets)
		if errs := set.AddList("list", list); errs == nil && set.Size() == 0 {
			t.Error("an empty list is no error")
		}
	})
}

func FuzzRuleValues(f *testing.F) {
	f.Add("443", "uid:0")
	f.Add("1-2", "cgroup:/x")
	f.Add("-", "/")
	f.Fuzz(func(t *testing.T, port, proc string) {
		if p, err := route.ParsePorts(port); err == nil && (p.First == 0 || p.First > p.Last) {
			t.Errorf("%q: %+v", port, p)
		}
		p, err := route.ParseProcesses(proc)
		if none := (process.Owner{UID: 1 << 31}); err == nil && proc != "uid:2147483648" && p.NeedsPID() && p.Contains(&none) {
			t.Errorf("%q holds a process of which nothing is known", proc)
		}
	})
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0
}
