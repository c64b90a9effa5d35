package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/relay"
)

func TestParseAddr(t *testing.T) {
	tests := []struct {
		in     string
		listen Addr
		dst    string // the error of ParseDst, or "" for the same Addr
	}{
		{"8080", TCP("127.0.0.1", 8080), ""},
		{":8080", TCP("", 8080), "missing host"},
		{"10.0.0.1:80", TCP("10.0.0.1", 80), ""},
		{"[::1]:80", TCP("::1", 80), ""},
		{"[fe80::1%eth0]:80", TCP("fe80::1%eth0", 80), ""},
		{"example.com:443", TCP("example.com", 443), ""},
		{"tcp://example.com:443", TCP("example.com", 443), ""},
		{"tcp://3000", TCP("127.0.0.1", 3000), ""},
		{"127.0.0.1:0", TCP("127.0.0.1", 0), "port 0"},
		{"unix:///run/x.sock", Addr{Network: "unix", Host: "/run/x.sock"}, ""},
		{"unix://x.sock", Addr{Network: "unix", Host: "x.sock"}, ""},
	}
	for _, tt := range tests {
		if a, err := ParseListen(tt.in); a != tt.listen || err != nil {
			t.Errorf("ParseListen(%q) = %+v, %v", tt.in, a, err)
		}
		a, err := ParseDst(tt.in)
		if tt.dst == "" && (a != tt.listen || err != nil) || tt.dst != "" && (err == nil || !strings.Contains(err.Error(), tt.dst)) {
			t.Errorf("ParseDst(%q) = %+v, %v", tt.in, a, err)
		}
	}
	for in, want := range map[string]string{
		"":                                   "empty",
		"example.com":                        "missing port (as in example.com:80)",
		"::1":                                "missing port (as in [::1]:80)",
		"::1:8080":                           "in brackets (as in [::1]:8080, or [::1:8080]:80)",
		"2001:db8::1":                        "missing port (as in [2001:db8::1]:80)",
		"::1:http":                           "not of the form host:port or [ipv6]:port",
		"a:b:c":                              "not of the form",
		"example.com:http":                   `port "http" is not a number`,
		"example.com:65536":                  `port "65536" is not a number`,
		"99999":                              `port "99999" is not a number`,
		"example.com:+80":                    `port "+80" is not a number`,
		"a b:80":                             "not a host name",
		"user@host:80":                       "an address has no user",
		"http://example.com:80":              `unknown scheme "http"`,
		"unix://":                            "missing path",
		"unix://" + strings.Repeat("x", 200): "107 bytes",
	} {
		for _, parse := range []func(string) (Addr, error){ParseListen, ParseDst} {
			if a, err := parse(in); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("parse %q: %+v, %v; want %s", in, a, err, want)
			}
		}
	}
}

// TestAddrErrorsKeepSecrets checks that a password which somebody writes into an address is not in the error.
func TestAddrErrorsKeepSecrets(t *testing.T) {
	for _, s := range []string{"me:secret@h:80", "socks5://me:secret@h:80", "tcp://me:secret@h", "me:se@cret@h:80", "secret@"} {
		for _, parse := range []func(string) (Addr, error){ParseDst, ParseListen} {
			if a, err := parse(s); err == nil || strings.Contains(err.Error(), "cret") {
				t.Errorf("%s: %v, %v", s, a, err)
			}
		}
	}
}

func TestAddr(t *testing.T) {
	for in, loopback := range map[string]bool{
		"8080": true, "[::1]:1": true, "localhost:1": true, "127.9.9.9:1": true, "[::ffff:127.0.0.1]:1": true, "unix:///x": true,
		":8080": false, "0.0.0.0:1": false, "10.0.0.1:1": false, "example.com:1": false,
	} {
		a, err := ParseListen(in)
		if err != nil || a.IsLoopback() != loopback {
			t.Errorf("%s: loopback %v, %v", in, a.IsLoopback(), err)
		}
	}
	if s := (Addr{}).String(); s != "" {
		t.Error(s)
	}
}

func FuzzParseAddr(f *testing.F) {
	for _, s := range []string{"8080", ":1", "[::1]:80", "unix:///x", "tcp://a:1", "a:b:c", "", "[::1", "x://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseListen(s)
		if err != nil {
			return
		}
		if again, err := ParseListen(a.String()); again != a || err != nil {
			t.Errorf("%q is %+v, printed as %q, which is %+v, %v", s, a, a.String(), again, err)
		}
		if d, err := ParseDst(s); err == nil && d != a {
			t.Errorf("%q: listen %+v, destination %+v", s, a, d)
		}
	})
}

func TestReasonOf(t *testing.T) {
	tests := []struct {
		err  error
		want Reason
	}{
		{nil, Done},
		{relay.ErrIdle, Idle},
		{relay.ErrHalfOpen, HalfOpen},
		{relay.ErrQuota, Denied},
		{context.Canceled, Canceled},
		{ErrStopped, Canceled},
		{&canceledError{syscall.ECONNRESET}, Canceled},
		{context.DeadlineExceeded, Timeout},
		{os.ErrDeadlineExceeded, Timeout},
		{syscall.ETIMEDOUT, Timeout},
		{&net.DNSError{IsTimeout: true}, Timeout},
		{&net.DNSError{IsNotFound: true}, NoHost},
		{&net.DNSError{Err: "server misbehaving"}, HostUnreachable},
		{ErrDenied, Denied},
		{syscall.ECONNREFUSED, Refused},
		{syscall.ENETUNREACH, NetUnreachable},
		{syscall.EHOSTUNREACH, HostUnreachable},
		{syscall.ECONNRESET, Reset},
		{syscall.EPIPE, Reset},
		{io.ErrUnexpectedEOF, Reset},
		{errors.ErrUnsupported, Unsupported},
		{syscall.EAFNOSUPPORT, Unsupported},
		{errors.New("else"), Other},
	}
	for _, tt := range tests {
		if got := ReasonOf(tt.err); got != tt.want {
			t.Errorf("%v is %v, want %v", tt.err, got, tt.want)
		}
		if tt.err == nil {
			continue
		}
		if got := ReasonOf(fmt.Errorf("outer: %w", &net.OpError{Op: "dial", Err: tt.err})); got != tt.want {
			t.Errorf("wrapped %v is %v, want %v", tt.err, got, tt.want)
		}
	}
	for r := Done; r <= Other; r++ {
		if r.String() == "" || r != Other && r.String() == "other" {
			t.Errorf("reason %d has no name", r)
		}
	}
}

func TestClientNetwork(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7":            "192.0.2.7/32",
		"::ffff:192.0.2.7":     "192.0.2.7/32",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
		"fe80::1:2:3:4%eth0":   "fe80::/64",
	} {
		if got := ClientNetwork(netip.MustParseAddr(in)); got != netip.MustParsePrefix(want) {
			t.Errorf("%s: %v, want %s", in, got, want)
		}
	}
	if got := ClientNetwork(netip.Addr{}); got.IsValid() {
		t.Errorf("no address: %v", got)
	}
}
