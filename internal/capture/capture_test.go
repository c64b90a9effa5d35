package capture

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestSpans(t *testing.T) {
	for _, tt := range []struct{ prefixes, v4, v6 string }{
		{"", "", ""},
		{"10.0.0.0/8", "10.0.0.0-11.0.0.0", ""},
		{"10.0.0.0/9 10.128.0.0/9 10.1.0.0/16 12.0.0.1/32", "10.0.0.0-11.0.0.0 12.0.0.1-12.0.0.2", ""}, // touching, nested, apart
		{"0.0.0.0/0 10.0.0.0/8 ::/0", "0.0.0.0-", "::-"},
		{"255.255.255.255/32 255.0.0.0/8", "255.0.0.0-", ""},
		{"fd00::/8 fc00::/8 2001:db8::1/128", "", "2001:db8::1-2001:db8::2 fc00::-fe00::"},
		{"192.168.7.5/24", "192.168.7.0-192.168.8.0", ""},
	} {
		var all []netip.Prefix
		for _, p := range strings.Fields(tt.prefixes) {
			all = append(all, netip.MustParsePrefix(p))
		}
		for _, perm := range [][]netip.Prefix{all, reversed(all)} {
			for v6, want := range map[bool]string{false: tt.v4, true: tt.v6} {
				var got []string
				for _, s := range spans(perm, v6) {
					end := ""
					if s.end.IsValid() {
						end = s.end.String()
					}
					got = append(got, fmt.Sprintf("%v-%s", s.first, end))
				}
				if g := strings.Join(got, " "); g != want {
					t.Errorf("%v: %s, want %s", perm, g, want)
				}
			}
		}
	}
}

func reversed(p []netip.Prefix) []netip.Prefix {
	p = slices.Clone(p)
	slices.Reverse(p)
	return p
}

func TestTargets(t *testing.T) {
	for at, want := range map[string]string{
		"127.0.0.1:1":           "127.0.0.1:1 invalid AddrPort",
		"127.0.0.1:1 [::1]:1":   "127.0.0.1:1 [::1]:1",
		"[::]:1":                "127.0.0.1:1 [::1]:1", // a socket for both
		"10.0.0.1:1":            "10.0.0.1:1 invalid AddrPort",
		"[fd00::1]:1":           "invalid AddrPort [fd00::1]:1",
		"[::ffff:10.0.0.1]:1":   "10.0.0.1:1 invalid AddrPort",
		"0.0.0.0:1 [fd00::1]:1": "127.0.0.1:1 [fd00::1]:1",
	} {
		var all []netip.AddrPort
		for _, a := range strings.Fields(at) {
			all = append(all, netip.MustParseAddrPort(a))
		}
		v4, v6 := targets(all)
		if got := v4.String() + " " + v6.String(); got != want {
			t.Errorf("%s: %s, want %s", at, got, want)
		}
	}
}
