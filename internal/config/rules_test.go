package config

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/process"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/route"
)

func TestBuildRules(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "list.txt", "# ads\n.ads.example\n198.51.100.0/24 # all of it\n")
	bounds := build(t, dir, `
inbounds:
  - {name: a, type: mixed, listen: 1}
  - {name: b, type: mixed, listen: 2, via: [corp]}
  - {name: far, type: reverse, listen: 1, to: 2, via: [ssh://x?ssh-config=none]}
rules:
  - {to: [.corp.example, 10.0.0.0/8], port: [443, 8000-8999], protocol: tcp, via: [corp]}
  - {to: [x.example], to-file: list.txt, via: [reject]}
  - {inbound: [b], user: [ann], from: [10.1.0.0/16], via: [direct]}
outbounds:
  - {name: corp, type: socks5, server: "c:1"}
`, nil)
	flow := func(dst string) proxy.Flow {
		a, err := proxy.ParseDst(dst)
		if err != nil {
			t.Fatal(err)
		}
		return proxy.Flow{Inbound: "b", Dst: a}
	}
	ann := flow("z.example:1")
	ann.User, ann.Client = "ann", netip.MustParseAddrPort("10.1.2.3:4")
	for what, want := range map[string]struct {
		f    proxy.Flow
		a, b string
	}{
		"suffix and port": {flow("x.CORP.example:8080"), "corp", "corp"},
		"suffix only":     {flow("x.corp.example:80"), "direct", "corp"},
		"not UDP":         {flow("udp://10.1.1.1:443"), "direct", "corp"},
		"named":           {flow("x.example:80"), "reject", "reject"},
		"listed":          {flow("y.ads.example:80"), "reject", "reject"},
		"network listed":  {flow("198.51.100.9:80"), "reject", "reject"},
		"of b and ann":    {ann, "direct", "direct"},
		"none":            {flow("z.example:443"), "direct", "corp"},
	} {
		for i, name := range []string{want.a, want.b} {
			f := want.f
			f.Inbound = bounds[i].Name
			got, d := bounds[i].Router.Route(f)
			if got != name || d == nil {
				t.Errorf("%s at %s: %s, %v; want %s", what, bounds[i].Name, got, d, name)
			}
			if _, starts := d.(proxy.Starter); starts != (name == "direct") {
				t.Errorf("%s at %s: %T is around its dialer", what, bounds[i].Name, d)
			}
		}
	}
	if name, d := bounds[2].Router.Route(flow("x.example:80")); name != "direct" {
		t.Errorf("what comes from afar went by a rule to %s, %v", name, d)
	}
}

func TestExplain(t *testing.T) {
	c, err := Load("s.yaml", []byte("inbounds: [{name: in, type: mixed, listen: 1}]\n"+
		"rules:\n- {port: [22], process: [ssh], via: [direct]}\n- port: [25]\n  via: [reject]\n"))
	if err != nil {
		t.Fatal(err)
	}
	bounds, err := c.Build(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]string{
		22: "in: x:22: by no rule, via direct",
		25: "in: x:25: by rules[1] (s.yaml:4), via reject",
	} {
		if got := c.Explain(&bounds[0], proxy.Flow{Dst: proxy.TCP("x", port)}); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestRuleOwners: processes are looked for as far as the rules ask for them.
func TestRuleOwners(t *testing.T) {
	if !process.Supported {
		t.Skip("this system does not tell")
	}
	for condition, want := range map[string]route.Owners{
		"port: [1]":                    nil,
		"process: ['uid:0', 'uid:1']":  &process.Table{UserOnly: true},
		"process: ['uid:0', 'curl']":   &process.Table{},
		"process: ['cgroup:/x.slice']": &process.Table{},
	} {
		b := build(t, t.TempDir(), "inbounds: [{type: mixed, listen: 1}]\nrules: [{"+condition+", via: [reject]}]", nil)[0]
		got := b.Router.(*route.Router).Owners
		switch table, ok := got.(*process.Table); {
		case (want == nil) != (got == nil):
			t.Errorf("%s: %v", condition, got)
		case ok && table.UserOnly != want.(*process.Table).UserOnly:
			t.Errorf("%s: user only is %v", condition, table.UserOnly)
		}
	}
}

func TestListErrors(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "bad.txt", "good.example\n0.0.0.0 bad.example\nworse_.*\n")
	file := filepath.Join(dir, "s.yaml")
	c, err := Load(file, []byte("inbounds: [{type: mixed, listen: 1}]\nrules:\n- to-file: bad.txt\n  via: [reject]\n"+
		"- {to-file: none.txt, via: [reject]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Build(nil, nil)
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(strings.ReplaceAll(err.Error(), dir+"/", ""), "\n")
	for i, want := range []string{
		`s.yaml:3: rules[0].to-file: bad.txt:2: "0.0.0.0 bad.example" is more than one word`,
		`s.yaml:3: rules[0].to-file: bad.txt:3: "worse_.*": a * can only stand`,
		`s.yaml:5: rules[1].to-file: open none.txt: no such file or directory`,
	} {
		if i >= len(lines) || !strings.HasPrefix(lines[i], want) {
			t.Errorf("line %d: %s", i, want)
		}
	}
	if t.Failed() || len(lines) != 3 {
		t.Error(err)
	}
}

func TestBuildGroups(t *testing.T) {
	const file = `
inbounds:
  - {type: mixed, listen: 1, via: [g]}
  - {type: mixed, listen: 2, via: [g, c]}
rules:
  - {port: [25], via: [all]}
outbounds:
  - {name: g, type: group, members: [b, "http://h:2", direct], policy: least-latency, check: "x:80", interval: 3s, keep: true}
  - {name: a, type: ssh, host: a, ssh-config: none}
  - {name: b, type: socks5, server: "b:1", via: [a]}
  - {name: c, type: socks5, server: "c:1"}
  - {name: all, type: group, members: [g, reject], policy: round-robin}
`
	bounds := build(t, t.TempDir(), file, nil)
	_, d := bounds[0].Router.Route(proxy.Flow{})
	g, ok := d.(*outbound.Group)
	if !ok {
		t.Fatalf("%T", d)
	}
	var names []string
	for _, m := range g.Members {
		names = append(names, m.Name)
	}
	if g.Name != "g" || g.Policy != outbound.LeastLatency || g.Check != proxy.TCP("x", 80) || g.Interval != 3*time.Second || !g.Keep ||
		!slices.Equal(names, []string{"b", "http://h:2", "direct"}) {
		t.Errorf("%+v", g)
	}
	b := g.Members[0].Dialer.(*outbound.SOCKS5)
	if _, ok := b.Via.(*outbound.SSH); !ok || b.Server != proxy.TCP("b", 1) {
		t.Errorf("%+v", b)
	}
	name, d := bounds[1].Router.Route(proxy.Flow{})
	if last := d.(*outbound.SOCKS5); name != "g,c" || last.Server != proxy.TCP("c", 1) || last.Via != proxy.Dialer(g) {
		t.Errorf("%s, %+v", name, d)
	}
	_, d = bounds[0].Router.Route(proxy.Flow{Dst: proxy.TCP("x", 25)})
	if all := d.(*outbound.Group); all.Members[0].Dialer != proxy.Dialer(g) || all.Policy != outbound.RoundRobin || all.Interval != 30*time.Second {
		t.Errorf("%+v", all)
	}
	// What is to be started and closed is what is used, once: the SSH server behind b, and the two groups.
	if n := len(bounds[0].kept); n != 3 {
		t.Errorf("%d parts are kept: %v", n, bounds[0].kept)
	}
	if k := slices.IndexFunc(bounds[0].kept, func(k kept) bool { return k == kept(g) }); k < 0 {
		t.Error("the group is not started")
	}
	for i := range bounds {
		bounds[i].Close()
	}
}
