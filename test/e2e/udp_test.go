package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	px "github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// longText is the TXT record of long.example.test: an answer of many datagrams' worth of DNS without EDNS.
var longText = strings.Repeat("0123456789", 20)

// nameServer starts dnsmasq, which knows example.test, and returns its address.
func nameServer(t *testing.T) string {
	t.Helper()
	addr := freeAddr(t)
	host, port, _ := net.SplitHostPort(addr)
	args := []string{"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
		"--bind-interfaces", "--listen-address=" + host, "--port=" + port, "--address=/example.test/192.0.2.7", "--edns-packet-max=4096"}
	for range 10 {
		args = append(args, "--txt-record=long.example.test,"+longText)
	}
	startServer(t, "udp://"+addr, "dnsmasq", args...)
	return addr
}

// forwardUDP starts sluice forward for datagrams, and has it stopped before what it leads to.
func forwardUDP(t *testing.T, dst string, flags ...string) string {
	t.Helper()
	addr := freeAddr(t)
	s := startSluice(t, []string{"udp://" + addr}, append([]string{"forward", "udp://" + addr, dst}, flags...)...)
	t.Cleanup(func() { s.stop(t) }) // sessions would go on for their time of silence
	return addr
}

// dig asks the server at addr.
func dig(t *testing.T, addr string, args ...string) result {
	t.Helper()
	host, port, _ := net.SplitHostPort(addr)
	return runProgram(t, nil, "dig", append([]string{"@" + host, "-p", port, "+tries=2", "+time=5", "+short"}, args...)...)
}

func TestForwardUDP(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "dig", "dnsmasq")
	for name, via := range map[string]func(t *testing.T) []string{
		"direct": func(*testing.T) []string { return nil },
		"sluice": func(t *testing.T) []string { return []string{"--via", "socks5://" + proxy(t)} },
		"sluice behind sluice": func(t *testing.T) []string {
			return []string{"--via", "socks5://" + proxy(t), "--via", "socks5://" + proxy(t)}
		},
		"danted": func(t *testing.T) []string { return []string{"--via", "socks5://" + danted(t)} },
		"danted behind sluice": func(t *testing.T) []string {
			return []string{"--via", "socks5://" + proxy(t), "--via", "socks5://" + danted(t)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := forwardUDP(t, nameServer(t), via(t)...)
			for range 3 {
				if r := dig(t, addr, "www.example.test", "A"); r.stdout != "192.0.2.7\n" {
					t.Errorf("%+v", r)
				}
			}
			r := dig(t, addr, "long.example.test", "TXT", "+bufsize=4096", "+ignore")
			if n := strings.Count(r.stdout, longText); n != 10 {
				t.Errorf("%d records of a long answer: %+v", n, r)
			}
		})
	}
}

// Datagrams of any length pass, through a proxy as well.
func TestForwardUDPLargest(t *testing.T) {
	t.Parallel()
	const header = 10 // of SOCKS5, for IPv4
	for name, tt := range map[string]struct {
		flags   func(t *testing.T) []string
		largest int
	}{
		"direct": {func(*testing.T) []string { return nil }, 65_507},
		"socks5": {func(t *testing.T) []string { return []string{"--via", "socks5://" + proxy(t)} }, 65_507 - header},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			echo := proxytest.EchoPackets(t, "127.0.0.1")
			c, err := net.Dial("udp", forwardUDP(t, echo.HostPort(), tt.flags(t)...))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got := make([]byte, 1<<16)
			for _, n := range []int{0, 1, 1472, 1473, 2048, 2049, tt.largest} {
				data := make([]byte, n)
				io.ReadFull(proxytest.Pattern(), data)
				c.SetDeadline(time.Now().Add(patience))
				c.Write(data)
				if m, err := c.Read(got); err != nil || !bytes.Equal(got[:m], data) {
					t.Errorf("%d bytes came back as %d, %v", n, m, err)
				}
			}
		})
	}
}

// A question to nobody is refused, as it would be without sluice.
func TestForwardUDPRefused(t *testing.T) {
	t.Parallel()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "dig")
	r := dig(t, forwardUDP(t, refusedAddr(t)), "example.test")
	if !strings.Contains(r.stdout+r.stderr, "connection refused") {
		t.Errorf("%+v", r)
	}
}

// What the log says of datagrams.
func TestForwardUDPLog(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "dig", "dnsmasq")
	addr := freeAddr(t)
	s := startSluice(t, []string{"udp://" + addr}, "forward", "udp://"+addr, nameServer(t))
	dig(t, addr, "www.example.test")
	begin := time.Now()
	s.stop(t)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v to stop after a question that was answered", took)
	}
	if log := s.log.String(); !strings.Contains(log, "msg=datagrams") || !strings.Contains(log, "dst=udp://") {
		t.Error(log)
	}
}

// BIND, through the program's client half and its server half.
func TestBind(t *testing.T) {
	t.Parallel()
	for _, hops := range []int{1, 2} {
		t.Run(fmt.Sprint(hops), func(t *testing.T) {
			addr := chainOf(t, hops)
			host, port, _ := net.SplitHostPort(addr)
			var n uint16
			fmt.Sscan(port, &n)
			d := &outbound.SOCKS5{Server: px.TCP(host, n)}
			ln, err := d.Bind(t.Context(), px.TCP("127.0.0.1", 20))
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			origin, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer origin.Close()
			c, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if peer := ln.(interface{ Peer() net.Addr }).Peer(); peer.String() != origin.LocalAddr().String() {
				t.Errorf("peer %v, want %v", peer, origin.LocalAddr())
			}
			go func() { io.WriteString(origin, "from the origin"); origin.(*net.TCPConn).CloseWrite() }()
			if got, err := io.ReadAll(c); string(got) != "from the origin" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			io.WriteString(c, "from the client")
			c.Close()
			if got, err := io.ReadAll(origin); string(got) != "from the client" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// chainOf starts a proxy behind so many hops.
func chainOf(t *testing.T, hops int) string {
	t.Helper()
	var addr string
	for i := range hops {
		var flags []string
		if i > 0 {
			flags = []string{"--via", "socks5://" + addr}
		}
		addr = proxy(t, flags...)
	}
	return addr
}
