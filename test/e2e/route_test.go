package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	px "github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// upstream is a proxy that origins can tell from others by the address of its connections.
type upstream struct {
	*sluice
	addr, ip string
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	addr := freeAddr(t)
	ip, _, _ := net.SplitHostPort(freeAddr(t))
	return &upstream{startSluice(t, []string{addr}, "proxy", addr, "--bind", ip), addr, ip}
}

// whoOrigin starts an origin at 127.0.0.1 that answers HTTP with the address of its peer.
func whoOrigin(t *testing.T) string {
	t.Helper()
	return httpOriginOf(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.Header().Set("Connection", "close")
		fmt.Fprintln(w, host)
	})
}

// who asks the origin dst through the sluice at addr who its peer is.
func who(addr, dst string) (string, error) {
	c, err := tryDialThrough("connect", addr, dst)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(b)), err
}

// expectWho fails the test unless the origin's peer is want.
func expectWho(t *testing.T, what, addr, dst, want string) {
	t.Helper()
	if got, err := who(addr, dst); got != want {
		t.Errorf("%s: the origin's peer is %s (%v), want %s", what, got, err, want)
	}
}

// startFile starts sluice with a configuration, which listens at addrs.
func startFile(t *testing.T, config string, addrs ...string) *sluice {
	t.Helper()
	return startSluice(t, addrs, "run", writeFile(t, "sluice.yaml", config))
}

// The first rule that matches decides: by suffix, by port, by network; and the inbound's way is for the rest.
func TestRules(t *testing.T) {
	t.Parallel()
	a, b := newUpstream(t), newUpstream(t)
	addr, plain, byPort := freeAddr(t), whoOrigin(t), whoOrigin(t)
	_, port, _ := net.SplitHostPort(plain)
	_, special, _ := net.SplitHostPort(byPort)
	s := startFile(t, fmt.Sprintf(`
inbounds:
  - {type: mixed, listen: %s}
rules:
  - {to: [forbidden.localhost], via: [reject]}
  - {port: [%s], via: [direct]}
  - {to: [.localhost], via: [a]}
  - {to: [127.0.0.0/8], protocol: tcp, via: ['socks5://%s']}
outbounds:
  - {name: a, type: http, server: '%s'}
`, addr, special, b.addr, a.addr), addr)
	expectWho(t, "port", addr, "localhost:"+special, "127.0.0.1")
	expectWho(t, "suffix", addr, "LocalHost:"+port, a.ip)
	expectWho(t, "network", addr, plain, b.ip)
	if got, err := who(addr, "forbidden.localhost:"+port); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("what is rejected: %s, %v", got, err)
	}
	for _, via := range []string{"via=direct", "via=a", "via=socks5://" + b.addr, "via=reject"} {
		proxytest.Until(t, via+" in the log", func() bool { return strings.Contains(s.log.String(), via+" ") })
	}
}

// A group goes over to its second member when the first hangs or is gone, and comes back.
func TestGroupFallback(t *testing.T) {
	t.Parallel()
	a, b := newUpstream(t), newUpstream(t)
	addr, origin := freeAddr(t), whoOrigin(t)
	s := startFile(t, fmt.Sprintf(`
dial-timeout: 8s
inbounds:
  - {type: mixed, listen: %s, via: [ways]}
outbounds:
  - {name: a, type: socks5, server: '%s'}
  - {name: b, type: http, server: '%s'}
  - {name: ways, type: group, members: [a, b], check: '%s', interval: 500ms}
`, addr, a.addr, b.addr, origin), addr)
	expectWho(t, "both are up", addr, origin, a.ip)
	refused := refusedAddr(t)
	if _, err := who(addr, refused); err == nil || !strings.Contains(err.Error(), "502") {
		t.Errorf("an origin that refuses: %v", err)
	}
	expectWho(t, "an origin refused", addr, origin, a.ip)

	a.cmd.Process.Signal(syscall.SIGSTOP)
	expectWho(t, "the first hangs", addr, origin, b.ip)
	proxytest.Until(t, "the log to say so", func() bool { return strings.Count(s.log.String(), "is down") == 1 })
	begin := time.Now()
	expectWho(t, "the first is known to hang", addr, origin, b.ip)
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("one that is known to hang was waited for: %v", took)
	}

	a.cmd.Process.Signal(syscall.SIGCONT)
	proxytest.Until(t, "the first in use again", func() bool {
		ip, err := who(addr, origin)
		if err != nil {
			t.Fatal(err)
		}
		return ip == a.ip
	})
	a.cmd.Process.Kill()
	<-a.done
	for range 5 {
		expectWho(t, "the first is gone", addr, origin, b.ip)
	}
	log := s.log.String()
	if down, up := strings.Count(log, "is down"), strings.Count(log, "is up again"); down != 2 || up != 1 {
		t.Errorf("down %d times and up %d times in the log", down, up)
	}
}

// A group that takes its members in turn shares alike, and leaves one out that is gone.
func TestGroupRoundRobin(t *testing.T) {
	t.Parallel()
	a, b := newUpstream(t), newUpstream(t)
	addr, origin := freeAddr(t), whoOrigin(t)
	startFile(t, fmt.Sprintf(`
inbounds:
  - {type: mixed, listen: %s, via: [ways]}
outbounds:
  - {name: ways, type: group, policy: round-robin, members: ['socks5://%s', 'http://%s']}
`, addr, a.addr, b.addr), addr)
	count := func(n int) map[string]int {
		seen := map[string]int{}
		for range n {
			ip, err := who(addr, origin)
			if err != nil {
				t.Error(err)
			}
			seen[ip]++
		}
		return seen
	}
	if seen := count(20); seen[a.ip] != 10 || seen[b.ip] != 10 {
		t.Errorf("%v, want 10 each of %s and %s", seen, a.ip, b.ip)
	}
	b.cmd.Process.Kill()
	<-b.done
	if seen := count(10); seen[a.ip] != 10 {
		t.Errorf("%v, want all through %s", seen, a.ip)
	}
}

// A rule for a program is about its connections alone, also where no goroutine waits for a client.
func TestRuleForProcess(t *testing.T) {
	t.Parallel()
	a := newUpstream(t)
	proxyAddr, forwardAddr, origin := freeAddr(t), freeAddr(t), whoOrigin(t)
	startFile(t, fmt.Sprintf(`
inbounds:
  - {type: mixed, listen: %s}
  - {type: forward, listen: %s, to: %s}
rules:
  - {process: [curl], via: [a]}
outbounds:
  - {name: a, type: socks5, server: '%s'}
`, proxyAddr, forwardAddr, origin, a.addr), proxyAddr, forwardAddr)
	for what, args := range map[string][]string{
		"socks5":  {"-x", "socks5h://" + proxyAddr, "http://" + origin + "/"},
		"http":    {"-x", "http://" + proxyAddr, "http://" + origin + "/"},
		"forward": {"http://" + forwardAddr + "/"},
	} {
		r := runProgram(t, nil, "curl", append([]string{"-sS", "--noproxy", "", "--max-time", "20"}, args...)...)
		if got := strings.TrimSpace(r.stdout); got != a.ip {
			t.Errorf("curl by %s: the origin's peer is %q, want %s: %s", what, got, a.ip, r.stderr)
		}
	}
	expectWho(t, "another program", proxyAddr, origin, "127.0.0.1")
	c, err := net.Dial("tcp", forwardAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if b, err := io.ReadAll(c); !strings.HasSuffix(string(b), "\r\n\r\n127.0.0.1\n") {
		t.Errorf("another program by the forward: %q, %v", b, err)
	}
}

// whoOriginUDP starts an origin for datagrams that answers with the address of its peer.
func whoOriginUDP(t *testing.T) (port uint16) {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		for b := make([]byte, 100); ; {
			_, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort([]byte(from.Addr().String()), from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-answered })
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// The rules hold for each datagram of an association, and not for the first alone.
func TestRulesForDatagrams(t *testing.T) {
	t.Parallel()
	a, addr := newUpstream(t), freeAddr(t)
	direct, other, forbidden := whoOriginUDP(t), whoOriginUDP(t), whoOriginUDP(t)
	s := startFile(t, fmt.Sprintf(`
inbounds:
  - {type: mixed, listen: %s, via: ['socks5://%s']}
rules:
  - {port: [%d], via: [direct]}
  - {port: [%d], via: [reject]}
`, addr, a.addr, direct, forbidden), addr)
	server, err := px.ParseDst(addr)
	if err != nil {
		t.Fatal(err)
	}
	c, err := (&outbound.SOCKS5{Server: server}).DialPackets(t.Context(), px.UDP("127.0.0.1", direct))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stop := time.AfterFunc(patience, func() { c.Close() })
	defer stop.Stop()
	send := func(port uint16) {
		if err := c.WritePacket(&relay.Packet{Endpoint: px.UDP("127.0.0.1", port).Endpoint(), Data: []byte("who?")}); err != nil {
			t.Error(err)
		}
	}
	var p relay.Packet
	defer p.Free()
	for range 3 {
		for port, want := range map[uint16]string{direct: "127.0.0.1", other: a.ip} {
			send(port)
			send(forbidden) // the first would end the association
			if err := c.ReadPacket(&p); err != nil {
				t.Fatal(err)
			}
			if p.Endpoint.Port != port || string(p.Data) != want {
				t.Errorf("%v says %s, want %s from %d", p.Endpoint, p.Data, want, port)
			}
		}
	}
	c.Close()
	proxytest.Until(t, "the log of it", func() bool { return strings.Contains(s.log.String(), "msg=datagrams") })
	if l := s.log.String(); !strings.Contains(l, "dropped=6") {
		t.Error(l)
	}
}
