package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/capture"
	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// writeFile writes a file that only its owner can read, beside the configuration in dir.
func writeFile(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// build loads and builds a configuration that lies in dir.
func build(t *testing.T, dir, file string, env map[string]string) []Bound {
	t.Helper()
	c, err := Load(filepath.Join(dir, "sluice.yaml"), []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	bounds, err := c.Build(nil, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	if err != nil {
		t.Fatal(err)
	}
	return bounds
}

// chainOf describes a dialer: the last hop first, as they are composed.
func chainOf(t *testing.T, d proxy.Dialer) string {
	t.Helper()
	switch d := d.(type) {
	case nil:
		return "nil"
	case *outbound.Direct:
		return fmt.Sprintf("direct(%v %s %d)", d.BindAddr, d.Interface, d.Mark)
	case *outbound.SOCKS5:
		return fmt.Sprintf("socks5(%v %s %s) over %s", d.Server, d.User, d.Password, chainOf(t, d.Via))
	case *outbound.HTTP:
		name := ""
		if d.TLS != nil {
			name = fmt.Sprintf(" as %s, roots %v", d.TLS.ServerName, d.TLS.RootCAs != nil)
		}
		return fmt.Sprintf("http(%v %s %s%s) over %s", d.Server, d.User, d.Password, name, chainOf(t, d.Via))
	case *outbound.Reject:
		return "reject"
	}
	t.Fatalf("unknown dialer %T", d)
	return ""
}

func TestBuildRoutes(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "corp.pass", "hunter2\r\n")
	_, cert := proxytest.CertificateFiles(t)
	const outbounds = `
outbounds:
  - {name: corp, type: socks5, server: "c:1", user: bob, password-file: corp.pass, via: [lan]}
  - {name: lan, type: direct, bind: 10.0.0.5, interface: eth0, mark: 7}
  - {name: deep, type: http, server: "d:2", via: [corp]}
  - {name: tls, type: https, server: "t:443", ca-file: CERT}
  - {name: named, type: https, server: "t:443", server-name: inner, user: bob, password-env: P}
`
	for via, want := range map[string]struct{ name, chain string }{
		"":                                       {"direct", "direct(invalid IP  0)"},
		"[direct]":                               {"direct", "direct(invalid IP  0)"},
		"[lan]":                                  {"lan", "direct(10.0.0.5 eth0 7)"},
		"[reject]":                               {"reject", "reject"},
		"[corp]":                                 {"lan,corp", "socks5(c:1 bob hunter2) over direct(10.0.0.5 eth0 7)"},
		"[deep]":                                 {"lan,corp,deep", "http(d:2  ) over socks5(c:1 bob hunter2) over direct(10.0.0.5 eth0 7)"},
		"['http://x:1', tls]":                    {"http://x:1,tls", "http(t:443   as t, roots true) over http(x:1  ) over nil"},
		"[named]":                                {"named", "http(t:443 bob secret as inner, roots false) over nil"},
		"['socks5://al@[::1]:1?password-env=P']": {"socks5://[::1]:1", "socks5([::1]:1 al secret) over nil"},
	} {
		t.Run(via, func(t *testing.T) {
			file := "inbounds:\n  - {type: mixed, listen: 1"
			if via != "" {
				file += ", via: " + via
			}
			file += "}" + strings.ReplaceAll(outbounds, "CERT", cert)
			b := build(t, dir, file, map[string]string{"P": "secret"})[0]
			name, d := b.Router.Route(proxy.Flow{})
			if name != want.name {
				t.Errorf("name %s, want %s", name, want.name)
			}
			if got := chainOf(t, d); got != want.chain {
				t.Errorf("got  %s\nwant %s", got, want.chain)
			}
		})
	}
}

func TestBuildInbounds(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "users", "# comment\nalice:a:b\r\n\nbob:b\n")
	bounds := build(t, dir, `
handshake-timeout: 3s
inbounds:
  - {name: f, type: forward, listen: unix:///s, mode: 0660, to: 80, send-proxy: v2, accept-proxy: true, allow: [10.0.0.0/8], deny: [10.0.0.1], max-conns: 5}
  - {name: s, type: socks5, listen: 1, users-file: users}
  - {name: h, type: http, listen: 2, users-env: U}
  - {name: m, type: mixed, listen: 3, users-file: users}
  - {name: o, type: mixed, listen: 4}
  - {name: r, type: mixed, listen: 5, reuse-port: true}
`, map[string]string{"U": "eve:e"})
	users := inbound.Users{"alice": "a:b", "bob": "b"}
	tcp := func(name string, port uint16) inbound.Listener {
		return inbound.Listener{Name: name, Addr: proxy.TCP("127.0.0.1", port), HandshakeTimeout: 3 * time.Second}
	}
	for i, want := range []proxy.Inbound{
		&inbound.Forward{Listener: inbound.Listener{Name: "f", Addr: proxy.Addr{Network: "unix", Host: "/s"}, Mode: 0o660,
			Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Deny: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")},
			MaxConns: 5, AcceptProxy: true, HandshakeTimeout: 3 * time.Second}, To: proxy.TCP("127.0.0.1", 80), SendProxy: 2},
		&inbound.SOCKS5{Listener: tcp("s", 1), Users: users},
		&inbound.HTTP{Listener: tcp("h", 2), Users: inbound.Users{"eve": "e"}},
		&inbound.Mixed{Listener: tcp("m", 3), Users: users},
		&inbound.Mixed{Listener: tcp("o", 4)}, // nil Users let everybody in; empty ones would let in nobody
		&inbound.Mixed{Listener: inbound.Listener{Name: "r", Addr: proxy.TCP("127.0.0.1", 5), ReusePort: true,
			HandshakeTimeout: 3 * time.Second}},
	} {
		if !reflect.DeepEqual(bounds[i].Inbound, want) {
			t.Errorf("got  %+v\nwant %+v", bounds[i].Inbound, want)
		}
	}
}

// TestRelaySettings: off is negative for the idle limits of the relay, whose zero is the default, and
// zero for all else. The limits of one inbound are no other's.
func TestRelaySettings(t *testing.T) {
	bounds := build(t, t.TempDir(), `
idle: off
half-open: 1m
inbounds:
  - {type: mixed, listen: 1}
  - {type: mixed, listen: 2, rate-per-session: 1MB, quota-per-session: 1KiB}
  - {type: mixed, listen: 3, rate: 2MB}
  - {type: mixed, listen: 4, rate: 2MB}
`, nil)
	for i, want := range []relay.Relay{{}, {Rate: 1e6, Quota: 1024}, {}, {}} {
		got := bounds[i].Relay
		if (got.Shared != nil) != (i >= 2) {
			t.Errorf("inbounds[%d]: shared limit %v", i, got.Shared)
		}
		got.Shared, want.Idle, want.HalfOpen = nil, got.Idle, time.Minute
		if got != want || got.Idle >= 0 {
			t.Errorf("inbounds[%d]: got %+v, want %+v", i, got, want)
		}
	}
	if bounds[2].Relay.Shared == bounds[3].Relay.Shared {
		t.Error("two inbounds share a limit")
	}
	polling := build(t, t.TempDir(), "busy-poll: 50us\ninbounds: [{type: mixed, listen: 1}]", nil)
	if got := polling[0].Relay.BusyPoll; got != 50*time.Microsecond {
		t.Errorf("busy poll %v", got)
	}
}

// TestSecretFilesAreReadOnce: they may be pipes, and two hops may name the same.
func TestSecretFilesAreReadOnce(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "p", "secret")
	reads := secrets{dir: dir, files: map[string][]byte{}}
	if _, err := reads.password("p", ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "p")); err != nil {
		t.Fatal(err)
	}
	if got, err := reads.password("p", ""); got != "secret" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// TestCaptureMarks: what sluice sends itself can be told apart from what it captures, whatever the way out.
func TestCaptureMarks(t *testing.T) {
	const file = `
inbounds:
- {type: tproxy, listen: 1, setup: true, from: [local, lan0], exclude: [10.0.0.0/8]}
- {type: mixed, listen: 2, via: ["socks5://10.0.0.9:1080"]}
- {type: redirect, listen: 3, via: [lan]}
outbounds:
- {name: lan, type: direct, mark: 7}
`
	c, err := Load("s.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	bounds, err := c.Build(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := bounds[0].Inbound.(*inbound.TProxy)
	k := p.Capture.(*capture.Capture)
	if p.Mark != capture.Mark || !k.TProxy || !k.UDP || !slices.Equal(k.Marks, []uint32{7}) || len(k.From) != 2 || len(k.Exclude) != 1 {
		t.Errorf("inbound %+v captures %+v", p, k)
	}
	if bounds[2].Inbound.(*inbound.Redirect).Capture != nil {
		t.Error("a redirect without setup captures")
	}
	for i, want := range []int{capture.Mark, capture.Mark, 7} {
		d := bounds[i].Router.(proxy.Static).Dialer
		if s, ok := d.(*outbound.SOCKS5); ok {
			d = s.Via
		}
		if got := d.(*outbound.Direct).Mark; got != want {
			t.Errorf("%s has the mark %#x, want %#x", bounds[i].Name, got, want)
		}
	}
}

// TestWay: a way out alone needs no inbounds, and its complaints name the flag's place.
func TestWay(t *testing.T) {
	var c Config
	way, err := c.Way(Inbound{Name: "x", Via: []string{"socks5://10.0.0.9:1080"}, RatePerSession: 1000}, nil, nil)
	if err != nil || way.Inbound != nil || way.Name != "x" || way.Relay.Rate != 1000 {
		t.Fatalf("%+v, %v", way, err)
	}
	name, d := way.Router.Route(proxy.Flow{})
	if _, ok := d.(*outbound.SOCKS5); !ok || name != "socks5://10.0.0.9:1080" {
		t.Errorf("the way is %q, %T", name, d)
	}
	_, err = c.Way(Inbound{Via: []string{"10.0.0.9"}}, nil, nil)
	if e, ok := errors.AsType[*Error](err); !ok || e.Path != "inbounds[0].via[0]" {
		t.Errorf("no hop: %v", err)
	}
}

func TestOnlySockets(t *testing.T) {
	const forward = "inbounds: [{type: forward, listen: '0', to: 'a:1'%s}]\n"
	for _, tt := range []struct {
		file string
		want bool
	}{
		{fmt.Sprintf(forward, ""), true},
		{fmt.Sprintf(forward, ", via: [direct]"), true},
		{fmt.Sprintf(forward, ", via: ['socks5://a:1', 'http://b:1']"), true},
		{fmt.Sprintf(forward, ", via: ['socks5://a:1', 'https://b:1']"), false},
		{fmt.Sprintf(forward, ", via: ['ssh://a']"), false},
		{fmt.Sprintf(forward, ", via: [x]") + "outbounds: [{name: x, type: group, members: [direct, 'ssh://a']}]", false},
		{fmt.Sprintf(forward, ", via: [x]") + "outbounds: [{name: x, type: socks5, server: 'a:1', via: ['https://b:1']}]", false},
		{fmt.Sprintf(forward, "") + "rules: [{port: ['22'], via: ['ssh://a']}]", false},
		{"inbounds: [{type: socks5, listen: '0'}, {type: redirect, listen: '0'}]", true},
		{"inbounds: [{type: socks5, listen: '0'}, {type: tun}]", false},
	} {
		c, err := Load("sluice.yaml", []byte(tt.file))
		if err != nil {
			t.Errorf("%s: %v", tt.file, err)
		} else if got := c.OnlySockets(); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.file, got, tt.want)
		}
	}
}
