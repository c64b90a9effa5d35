package socks5

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestDatagram(t *testing.T) {
	ip := netip.MustParseAddr
	tests := []struct {
		name string
		in   string
		want Place
		err  error
	}{
		{"IPv4", "\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x35data", Place{IP: ip("127.0.0.1"), Port: 53}, nil},
		{"IPv6", "\x00\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x01\xbbdata", Place{IP: ip("::1"), Port: 443}, nil},
		{"mapped", "\x00\x00\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x00\x35data",
			Place{IP: ip("127.0.0.1"), Port: 53}, nil},
		{"name", "\x00\x00\x00\x03\x0bexample.com\x00\x35data", Place{Name: "example.com", Port: 53}, nil},
		{"address as a name", "\x00\x00\x00\x03\x09127.0.0.1\x00\x35data", Place{IP: ip("127.0.0.1"), Port: 53}, nil},
		{"reserved bytes", "\x12\x34\x00\x01\x7f\x00\x00\x01\x00\x35data", Place{IP: ip("127.0.0.1"), Port: 53}, nil},
		{"fragment", "\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x35data", Place{}, ErrFragment},
		{"empty", "", Place{}, ErrMalformed},
		{"short", "\x00\x00\x00\x01\x7f\x00\x00\x01\x00", Place{}, ErrMalformed},
		{"short name", "\x00\x00\x00\x03\xffexample.com\x00\x35", Place{}, ErrMalformed},
		{"no name", "\x00\x00\x00\x03\x00\x00\x35data", Place{}, ErrMalformed},
		{"not a name", "\x00\x00\x00\x03\x03a/b\x00\x35data", Place{}, ErrMalformed},
		{"address type", "\x00\x00\x00\x02\x7f\x00\x00\x01\x00\x35data", Place{}, ErrMalformed},
	}
	for _, tt := range tests {
		p, payload, err := ParseDatagram([]byte(tt.in))
		if p != tt.want || !errors.Is(err, tt.err) || err == nil && string(payload) != "data" {
			t.Errorf("%s: %+v %q %v", tt.name, p, payload, err)
		}
	}
}

// FuzzDatagram: no input panics, and what is read comes out again when it is written.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x35data"))
	f.Add([]byte("\x00\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x01\xbb"))
	f.Add([]byte("\x00\x00\x00\x03\x0bexample.com\x00\x35data"))
	f.Add([]byte("\x00\x00\x00\x03\x09fe80::1%a\x00\x35data"))
	f.Add([]byte("\x00\x00\x01\x03\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		p, payload, err := ParseDatagram(in)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(in, payload) || p.IP.IsValid() == (p.Name != "") {
			t.Fatalf("%+v with %d of %d bytes", p, len(payload), len(in))
		}
		out, err := AppendDatagram(nil, p, payload)
		if err != nil || len(out) > MaxDatagramHeader+len(payload) {
			t.Fatalf("cannot write %+v: %d bytes, %v", p, len(out), err)
		}
		q, rest, err := ParseDatagram(out)
		if q != p || !bytes.Equal(rest, payload) || err != nil {
			t.Fatalf("%+v came back as %+v, %v", p, q, err)
		}
	})
}
