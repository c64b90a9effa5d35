package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/capture"
	"github.com/sluice-proxy/sluice/internal/dns"
	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/netstack"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

func TestBuildTUN(t *testing.T) {
	const own = tundev.DefaultMark
	v4, v6 := dns.Prefixes()
	lab := netip.MustParsePrefix("10.20.0.0/16")
	for _, tt := range []struct {
		keys  string
		want  tundev.Setup
		front string // the mode and the resolver; empty: there is no front
	}{
		{"", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}}, ""},
		{", via: [s]", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}, DNS: true}, "fake "},
		{", via: [s], dns: 'fake,1.1.1.1'", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}, DNS: true}, "fake udp://1.1.1.1:53"},
		{", via: [s], dns: '10.0.0.1:54'", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}, DNS: true}, "hijack udp://10.0.0.1:54"},
		{", via: [s], dns: off", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}}, ""},
		{", via: [s], include: [10.20.0.0/16]", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}, Include: []netip.Prefix{lab}}, ""},
		{", include: [10.20.0.0/16], dns: fake", tundev.Setup{Name: "sluice0", Marks: []uint32{own, 7}, DNS: true,
			Include: []netip.Prefix{lab, v4, v6}}, "fake "},
		{", name: x, netns: lab, exclude: [10.20.0.0/16], mtu: 1400", tundev.Setup{Name: "x", Namespace: "lab", MTU: 1400,
			Exclude: []netip.Prefix{lab}}, ""},
	} {
		bound := build(t, t.TempDir(), "inbounds: [{type: tun"+tt.keys+"}]\noutbounds: [{name: s, type: socks5, server: 's:1'}, {name: m, type: direct, mark: 7}]", nil)[0]
		if got := bound.Inbound.(*netstack.TUN).Setup; !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", tt.keys, got, tt.want)
		}
		front := ""
		if bound.Front != nil {
			h := bound.Front(nil).(*dns.Handler)
			front = map[dns.Mode]string{dns.Fake: "fake", dns.Hijack: "hijack"}[h.Mode] + " " + h.Resolver.String()
		}
		if front != tt.front {
			t.Errorf("%s: DNS %q, want %q", tt.keys, front, tt.front)
		}
	}
}

// TestMarks: what we connect to ourselves is told apart where the tun takes our own network's traffic, and only there, whatever
// the way out, and for other inbounds, too.
func TestMarks(t *testing.T) {
	for _, tt := range []struct{ tun, via, want string }{
		{"netns: lab", "", "direct(invalid IP  0)"},
		{"netns: lab", "[s]", "socks5(s:1  ) over nil"},
		{"mtu: 1500", "", "direct(invalid IP  1936457728)"},
		{"mtu: 1500", "[s]", "socks5(s:1  ) over direct(invalid IP  1936457728)"},
		{"mtu: 1500", "[m, s]", "socks5(s:1  ) over direct(invalid IP  7)"},
		{"mtu: 1500", "[m]", "direct(invalid IP  7)"},
	} {
		via := ""
		if tt.via != "" {
			via = ", via: " + tt.via
		}
		bounds := build(t, t.TempDir(), fmt.Sprintf("inbounds: [{type: mixed, listen: 1%s}, {type: tun, %s%[1]s}]\n", via, tt.tun)+
			"outbounds: [{name: s, type: socks5, server: 's:1'}, {name: m, type: direct, mark: 7}]", nil)
		for _, b := range bounds {
			_, d := b.Router.Route(proxy.Flow{})
			if got := chainOf(t, d); got != tt.want {
				t.Errorf("%s by a %T with a tun of %s: %s, want %s", tt.via, b.Inbound, tt.tun, got, tt.want)
			}
		}
	}
}

func TestTUNErrors(t *testing.T) {
	for keys, want := range map[string]string{
		"name: a-very-long-name": `inbounds[0].name: "a-very-long-name" is too long for the name of a device (15 letters at most)`,
		"netns: a/b":             `inbounds[0].netns: "a/b" is not the name of a network namespace`,
		"mtu: 1279":              "inbounds[0].mtu: 1279 is not a number from 1280 to 65535",
		"mtu: 0":                 "inbounds[0].mtu: 0 is not a number from 1280 to 65535",
		"include: [10.0.0.0/8], exclude: ['::1', 10.0.0.0/8]": "inbounds[0].exclude[1]: 10.0.0.0/8 is included, too",
		"include: [10.0.0.1/8]":                               `inbounds[0].include[0]: "10.0.0.1/8" has bits behind the prefix`,
		"dns: fale":                                           `inbounds[0].dns: "fale" is neither fake, off, nor the IP address of a resolver`,
		"dns: ''":                                             "inbounds[0].dns: is empty",
		"listen: 1080":                                        "inbounds[0].listen: does not apply to type tun",
		"max-conns: 5":                                        "inbounds[0].max-conns: does not apply to type tun",
		"allow: [10.0.0.0/8]":                                 "inbounds[0].allow: does not apply to type tun",
	} {
		_, err := Load("s.yaml", []byte("inbounds: [{type: tun, "+keys+"}]"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", keys, err, want)
		}
	}
	for _, netns := range []string{"", ", netns: lab"} {
		_, err := Load("s.yaml", []byte("inbounds: [{type: tun"+netns+"}, {type: tun, netns: other}, {type: tun"+netns+"}]"))
		if err == nil || !strings.Contains(err.Error(), "inbounds[2].netns: inbounds[0] takes the traffic of that network already") {
			t.Errorf("two in one network: %v", err)
		}
	}
	_, err := Load("s.yaml", []byte("inbounds: [{type: mixed, listen: 1, netns: lab}]"))
	if err == nil || !strings.Contains(err.Error(), "inbounds[0].netns: does not apply to type mixed") {
		t.Error(err)
	}
}

// TestTProxyNames: a tproxy that has dns has its questions answered, and all that belongs to them captured.
func TestTProxyNames(t *testing.T) {
	fake4, fake6 := dns.Prefixes()
	for _, tt := range []struct {
		keys string
		mode dns.Mode
		fake []netip.Prefix
	}{
		{"", dns.Off, nil}, {", dns: off", dns.Off, nil}, {", dns: 1.1.1.1", dns.Hijack, nil},
		{", dns: fake", dns.Fake, []netip.Prefix{fake4, fake6}}, {", dns: 'fake,1.1.1.1'", dns.Fake, []netip.Prefix{fake4, fake6}},
	} {
		b := build(t, t.TempDir(), "inbounds: [{type: tproxy, listen: 1, setup: true, via: ['http://p:1']"+tt.keys+"}]", nil)[0]
		k := b.Inbound.(*inbound.TProxy).Capture.(*capture.Capture)
		if k.DNS != (tt.mode != dns.Off) || !slices.Equal(k.Fake, tt.fake) || k.UDP {
			t.Errorf("%s: captured %+v", tt.keys, k)
		}
		if (b.Front != nil) != (tt.mode != dns.Off) {
			t.Errorf("%s: in front is %v", tt.keys, b.Front != nil)
		} else if b.Front != nil {
			if h := b.Front(nil).(*dns.Handler); h.Mode != tt.mode || h.Router == nil {
				t.Errorf("%s: in front is %+v", tt.keys, h.Mode)
			}
		}
	}
	if _, err := Load("s.yaml", []byte("inbounds: [{type: redirect, listen: 1, dns: fake}]")); err == nil ||
		!strings.Contains(err.Error(), "inbounds[0].dns: does not apply to type redirect") {
		t.Error(err)
	}
}

// TestTUNNames: a device needs a name that its namespace does not have yet, and each tun gets its own.
func TestTUNNames(t *testing.T) {
	c, err := Load("s.yaml", []byte("inbounds: [{type: tun}, {name: sluice1, type: tun, netns: a}, {type: tun, netns: b}]"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, in := range c.Inbounds {
		names = append(names, in.Name)
	}
	if want := []string{"sluice0", "sluice1", "sluice2"}; !slices.Equal(names, want) {
		t.Errorf("names %v, want %v", names, want)
	}
}

// TestDeviceAddresses: no name gets an address that a device may have.
func TestDeviceAddresses(t *testing.T) {
	fake4, fake6 := dns.Prefixes()
	own4, own6 := tundev.Addrs()
	for own, fake := range map[netip.Prefix]netip.Prefix{own4: fake4, own6: fake6} {
		if own.Addr() != fake.Masked().Addr() || own.Addr().BitLen()-own.Bits() > 4 { // the first 16
			t.Errorf("%v is not the free part of %v", own, fake)
		}
	}
}
