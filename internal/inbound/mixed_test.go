package inbound

import (
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// curl gets through by both protocols on one port, with and without a password, and a PROXY header before.
func TestMixedCurl(t *testing.T) {
	proxytest.Need(t, "curl")
	const page = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
	h := &proxytest.RecordingHandler{Serve: proxytest.AfterHeader(page)}
	for _, users := range []Users{nil, {"ann": "secret"}} {
		a := startInbound(t, &Mixed{Listener: Listener{Addr: loopback}, Users: users}, h)
		for _, args := range [][]string{
			{"--socks5-hostname", a.String()}, {"--proxy", "http://" + a.String()}, {"--proxytunnel", "--proxy", "http://" + a.String()},
		} {
			get := func(user string) (string, error) {
				args := append([]string{"-sS", "--max-time", "20", "http://example.test/"}, args...)
				if user != "" {
					args = append(args, "--proxy-user", user)
				}
				out, err := exec.Command("curl", args...).CombinedOutput()
				return string(out), err
			}
			right, wrong := "", "-"
			if users != nil {
				right, wrong = "ann:secret", "ann:public"
			}
			if out, err := get(right); err != nil || out != "hello" {
				t.Errorf("%v: %v: %s", args, err, out)
			}
			if wrong != "-" {
				if out, err := get(wrong); err == nil && out == "hello" {
					t.Errorf("%v: let in with the wrong password", args)
				}
			}
		}
	}
	for _, f := range h.Flows() {
		if f.Dst != proxy.TCP("example.test", 80) {
			t.Errorf("flow %+v", f)
		}
	}
	if n := len(h.Flows()); n != 6 {
		t.Errorf("%d flows, want 6", n)
	}
}

func TestMixedRefusesOthers(t *testing.T) {
	for first, want := range map[string]string{
		"\x04\x01\x00\x50\x01\x02\x03\x04\x00": "SOCKS4 is not supported",
		"\x16\x03\x01\x02\x00":                 "TLS on a plain proxy port",
		"\x00":                                 "the first byte is 0x00",
		"get / HTTP/1.1\r\n\r\n":               "the first byte is 0x67",
	} {
		var log logBuffer
		h := &proxytest.RecordingHandler{}
		t.Run(fmt.Sprintf("%.1q", first), func(t *testing.T) {
			c := dial(t, startInbound(t, &Mixed{Listener: Listener{Addr: loopback, Log: log.logger()}}, h))
			io.WriteString(c, first)
			b, err := io.ReadAll(c)
			if err != nil {
				t.Error(err)
			}
			if first[0] == 4 && string(b) != "\x00\x5b\x00\x00\x00\x00\x00\x00" {
				t.Errorf("the answer to SOCKS4 is %q", b)
			}
		})
		if log.count(want) != 1 || log.count("\n") != 1 || log.count("reason=unsupported") != 1 {
			t.Errorf("want %q, log: %s", want, log.b.String())
		}
		if len(h.Flows()) != 0 {
			t.Errorf("%q was handed over", first)
		}
	}
}

// The byte that is peeked at may come from what was read with a PROXY header.
func TestMixedBehindProxyHeader(t *testing.T) {
	h := &proxytest.RecordingHandler{}
	path := filepath.Join(t.TempDir(), "s")
	c := dial(t, startInbound(t, &Mixed{Listener: Listener{Addr: unixAddr(path), AcceptProxy: true}}, h))
	io.WriteString(c, v1Header+"CONNECT example.test:80 HTTP/1.1\r\nHost: example.test:80\r\n\r\nearly")
	c.(interface{ CloseWrite() error }).CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200") || !strings.HasSuffix(string(b), "\r\n\r\nearly") {
		t.Errorf("%q, %v", b, err)
	}
	if f := h.Flows(); len(f) != 1 || f[0].Client.String() != "192.0.2.7:4711" || f[0].Dst != proxy.TCP("example.test", 80) {
		t.Errorf("flows %+v", f)
	}
}
