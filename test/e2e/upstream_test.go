package e2e

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// danted starts Dante as an upstream.
func danted(t *testing.T) string {
	t.Helper()
	addr := freeAddr(t)
	host, port, _ := net.SplitHostPort(addr)
	conf := writeFile(t, "danted.conf", fmt.Sprintf(`
logoutput: stderr
internal: %s port = %s
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
`, host, port))
	startServer(t, addr, "danted", "-N", "1", "-f", conf, "-p", writeFile(t, "pid", ""))
	return addr
}

// microsocks starts it as an upstream; flags come last.
func microsocks(t *testing.T, flags ...string) string {
	t.Helper()
	addr := freeAddr(t)
	host, port, _ := net.SplitHostPort(addr)
	startServer(t, addr, "microsocks", append([]string{"-i", host, "-p", port}, flags...)...)
	return addr
}

// Any upstream, and any chain of them, carries what a direct way does.
func TestUpstreams(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	refused := refusedAddr(t)
	for name, upstreams := range map[string]func(t *testing.T) []string{
		"danted":     func(t *testing.T) []string { return []string{"socks5://" + danted(t)} },
		"microsocks": func(t *testing.T) []string { return []string{"socks5://" + microsocks(t)} },
		"sluice by SOCKS5": func(t *testing.T) []string {
			return []string{"socks5://" + proxy(t)}
		},
		"sluice by CONNECT": func(t *testing.T) []string {
			return []string{"http://" + proxy(t)}
		},
		"SOCKS5 over CONNECT over SOCKS5": func(t *testing.T) []string {
			return []string{"socks5://" + microsocks(t), "http://" + proxy(t), "socks5://" + danted(t)}
		},
		"sluice behind sluice": func(t *testing.T) []string { // each with its own upstream
			return []string{"socks5://" + proxy(t, "--via", "http://"+proxy(t))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var via []string
			for _, u := range upstreams(t) {
				via = append(via, "--via", u)
			}
			front := proxy(t, via...)
			var body strings.Builder
			fmt.Fprintf(&body, "%s", strings.Repeat("body ", 200000))
			for _, way := range []string{"socks5", "socks5h", "connect", "http"} {
				b := browserVia(t, way, front, origin)
				b.expect(t, "hello\n", b.url+"/hello")
				checkOutput(t, b.send(t, strings.NewReader(body.String()), "-T", "-", b.url+"/sum"), sum(strings.NewReader(body.String()))+"\n")
			}

			// The last upstream's reason arrives at the client.
			b := browserVia(t, "socks5", front, refused)
			if r := b.curl(t, b.url); r.code != 97 || !strings.Contains(r.stderr, "(5)") {
				t.Errorf("refused: %+v", r)
			}
			b = browserVia(t, "connect", front, refused)
			if r := b.curl(t, "-w", "%{http_connect}", b.url); !strings.Contains(r.stdout, "502") {
				t.Errorf("refused: %+v", r)
			}

			// A forward through the same upstreams.
			fwd := newBrowser(t, "forward", origin, via...)
			fwd.expect(t, "hello\n", fwd.url+"/hello")
		})
	}
}

// Half-closes and resets pass through chains of sluices as through one.
func TestChainEndings(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "nc")
	origin := tcpOrigin(t, lateReply)
	web := httpOrigin(t, "127.0.0.1")
	via := []string{"--via", "socks5://" + proxy(t), "--via", "http://" + proxy(t)}
	host, port, _ := net.SplitHostPort(forward(t, origin, via...))
	checkOutput(t, runProgram(t, strings.NewReader("request"), "nc", "-N", host, port), sum(strings.NewReader("request"))+"\n")

	front := proxy(t, via...)
	for _, way := range []string{"socks5", "connect", "http"} {
		b := browserVia(t, way, front, web)
		r := b.curl(t, "-o", "/dev/null", b.url+"/aborted-close?n=100000")
		if r.code != 18 && r.code != 56 {
			t.Errorf("%s: an aborted download ended with code %d", way, r.code)
		}
	}
}

// Upstreams that want a name and a password get them from the configuration.
func TestUpstreamUsers(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	users := writeFile(t, "users", "alice:correct horse\n")
	password := writeFile(t, "password", "correct horse\n")
	wrong := writeFile(t, "password", "battery staple\n")
	sluiced := proxy(t, "--users-file", users)
	for name, server := range map[string][2]string{
		"microsocks": {"socks5", microsocks(t, "-u", "alice", "-P", "correct horse")},
		"socks5":     {"socks5", sluiced},
		"http":       {"http", sluiced},
	} {
		t.Run(name, func(t *testing.T) {
			for file, good := range map[string]bool{password: true, wrong: false} {
				addr := freeAddr(t)
				conf := writeFile(t, "sluice.yaml", fmt.Sprintf(`
inbounds:
  - type: mixed
    listen: %s
    via: [up]
outbounds:
  - name: up
    type: %s
    server: %s
    user: alice
    password-file: %s
`, addr, server[0], server[1], file))
				startSluice(t, []string{addr}, "run", conf)
				b := browserVia(t, "connect", addr, origin)
				r := b.curl(t, b.url+"/hello")
				if good {
					checkOutput(t, r, "hello\n")
				} else if !slices.Contains([]int{7, 56}, r.code) {
					t.Errorf("with a wrong password: %+v", r)
				}
			}
		})
	}
}
