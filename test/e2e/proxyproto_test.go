package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
)

// clientIP is where the clients of these tests connect from: not the address that the kernel would
// choose, so that it cannot come about by chance.
const clientIP = "127.99.98.97"

// haproxyOrigin starts HAProxy as an origin that wants a PROXY header and replies with the client's
// address.
func haproxyOrigin(t *testing.T) string {
	t.Helper()
	addr := freeAddr(t)
	haproxy(t, addr, `
frontend origin
	mode http
	bind `+addr+` accept-proxy
	http-request return status 200 content-type text/plain lf-string "client=%[src]"
`)
	return addr
}

// haproxyHop starts HAProxy as a load balancer in front of server, with settings for it.
func haproxyHop(t *testing.T, server, settings string) string {
	t.Helper()
	addr := freeAddr(t)
	haproxy(t, addr, `
listen hop
	mode tcp
	bind `+addr+`
	server s `+server+" "+settings+`
`)
	return addr
}

func haproxy(t *testing.T, addr, sections string) {
	t.Helper()
	startServer(t, addr, "haproxy", "-db", "-q", "-f", writeFile(t, "haproxy.cfg", `
global
	maxconn 200
defaults
	timeout connect 5s
	timeout client 60s
	timeout server 60s
`+sections))
}

// nginxOrigin starts nginx as an origin that wants a PROXY header and replies with the client's
// address: over HTTP at the first address, as its first bytes at the second.
func nginxOrigin(t *testing.T) (web, stream string) {
	t.Helper()
	dir := t.TempDir()
	web, stream = freeAddr(t), freeAddr(t)
	module := ""
	if so := "/usr/lib/nginx/modules/ngx_stream_module.so"; fileExists(so) {
		module = "load_module " + so + ";"
	}
	conf := writeIn(t, dir, "nginx.conf", fmt.Sprintf(`
%s
daemon off;
master_process off;
pid %s/pid;
error_log stderr;
events { worker_connections 100; }
http {
	access_log off;
	client_body_temp_path %[2]s/body;
	proxy_temp_path %[2]s/proxy;
	fastcgi_temp_path %[2]s/fastcgi;
	uwsgi_temp_path %[2]s/uwsgi;
	scgi_temp_path %[2]s/scgi;
	server {
		listen %[3]s proxy_protocol;
		location / { return 200 "client=$proxy_protocol_addr"; }
	}
}
stream {
	server {
		listen %[4]s proxy_protocol;
		return "client=$proxy_protocol_addr";
	}
}
`, module, dir, web, stream))
	p := startServer(t, web, "nginx", "-p", dir, "-e", "stderr", "-c", conf)
	p.waitListening(t, stream)
	return web, stream
}

func fileExists(name string) bool { _, err := os.Stat(name); return err == nil }

// sluice tells HAProxy and nginx where its clients come from.
func TestSendProxy(t *testing.T) {
	t.Parallel()
	web, stream := nginxOrigin(t)
	haproxyWeb := haproxyOrigin(t)
	for _, version := range []string{"v1", "v2"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			for name, origin := range map[string]string{"haproxy": haproxyWeb, "nginx": web} {
				b := newBrowser(t, "forward", origin, "--send-proxy", version)
				r := b.curl(t, "--interface", clientIP, b.url)
				if r.stdout != "client="+clientIP {
					t.Errorf("%s saw %+v", name, r)
				}
			}
			host, port, _ := net.SplitHostPort(forward(t, stream, "--send-proxy", version))
			// An origin that speaks first: the header does not wait for the client's first bytes.
			r := runProgram(t, nil, "nc", "-d", "-s", clientIP, host, port)
			if r.stdout != "client="+clientIP {
				t.Errorf("nginx's stream saw %+v", r)
			}
		})
	}
}

// A client's address survives HAProxy, sluice and the origin in a row.
func TestAcceptProxy(t *testing.T) {
	t.Parallel()
	web, _ := nginxOrigin(t)
	for _, settings := range []string{"send-proxy", "send-proxy-v2"} {
		for _, version := range []string{"v1", "v2"} {
			t.Run(settings+" "+version, func(t *testing.T) {
				t.Parallel()
				hop := haproxyHop(t, forward(t, web, "--accept-proxy", "--send-proxy", version), settings)
				r := runProgram(t, nil, "curl", "-q", "-sS", "--interface", clientIP, "http://"+hop)
				if r.stdout != "client="+clientIP {
					t.Errorf("the origin saw %+v", r)
				}
			})
		}
	}
	t.Run("proxy", func(t *testing.T) { // HAProxy in front of the proxy's port
		t.Parallel()
		origin := httpOrigin(t, "127.0.0.1")
		hop := haproxyHop(t, proxy(t, "--accept-proxy"), "send-proxy-v2")
		for _, way := range []string{"socks5", "connect", "http"} {
			b := browserVia(t, way, hop, origin)
			b.expect(t, "hello\n", b.url+"/hello")
		}
	})
	t.Run("without a header", func(t *testing.T) {
		t.Parallel()
		b := newBrowser(t, "forward", httpOrigin(t, "127.0.0.1"), "--accept-proxy")
		if r := b.curl(t, b.url+"/hello"); r.code == 0 || strings.Contains(r.stdout, "hello") {
			t.Errorf("a client without a PROXY header was let in: %+v", r)
		}
	})
}

// A plain forward in front of, and behind, HAProxy.
func TestHAProxyHop(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	front := haproxyHop(t, forward(t, origin), "")
	back := forward(t, haproxyHop(t, origin, ""))
	for _, addr := range []string{front, back} {
		r := runProgram(t, nil, "curl", "-q", "-sS", "http://"+addr+"/hello")
		checkOutput(t, r, "hello\n")
	}
}
