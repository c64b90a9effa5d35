package main

import (
	"net"
	"testing"

	"github.com/sluice-proxy/sluice/internal/config"
)

func TestTryIt(t *testing.T) {
	tcp := func(s string) net.Addr {
		a, err := net.ResolveTCPAddr("tcp", s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, test := range []struct {
		in   config.Inbound
		at   net.Addr
		want string
	}{
		{config.Inbound{Type: "mixed"}, tcp("127.0.0.1:1080"), "curl -x socks5h://127.0.0.1:1080 https://example.com/"},
		{config.Inbound{Type: "http"}, tcp("[::1]:3128"), "curl -x http://[::1]:3128 https://example.com/"},
		{config.Inbound{Type: "socks5", UsersFile: "x"}, tcp("[::]:1080"), // all addresses: one that can be dialled
			"curl -x socks5h://127.0.0.1:1080 --proxy-user NAME https://example.com/"},
		{config.Inbound{Type: "forward", To: config.Dst{Network: "tcp", Host: "example.com", Port: 80}}, tcp("127.0.0.1:8080"),
			"curl -H 'Host: example.com' http://127.0.0.1:8080/"},
		{config.Inbound{Type: "forward", To: config.Dst{Network: "tcp", Host: "db", Port: 5432}}, tcp("127.0.0.1:5432"), ""},
		{config.Inbound{Type: "mixed"}, &net.UnixAddr{Name: "/run/x", Net: "unix"}, ""},
	} {
		if got := tryIt(test.in, test.at); got != test.want {
			t.Errorf("%+v at %v: %q, want %q", test.in, test.at, got, test.want)
		}
	}
}
