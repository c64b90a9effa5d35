package transparent

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// dig asks a name server from ns.
func (ns namespace) dig(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(ns.run(t, append([]string{"dig", "+short", "+tries=1", "+time=20"}, args...)...))
}

// httpProxy is an HTTP proxy that connects to nothing, but greets, and remembers what it was asked for.
type httpProxy struct {
	mu    sync.Mutex
	asked []string
}

func (p *httpProxy) serve(c net.Conn) {
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.Host)
	p.mu.Unlock()
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err == nil {
		greet(c)
	}
}

func (p *httpProxy) wasAsked(host string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.asked, host)
}

// TestFakeNames: with dns fake, questions of a LAN and of the machine itself are answered with addresses that lead to names, also where the way out
// carries no datagrams and where only some networks are captured. Other datagrams are as they would be without.
func TestFakeNames(t *testing.T) {
	t.Parallel()
	for _, more := range [][]string{nil, {"--include", "10.99.0.0/16"}} {
		t.Run(strings.Join(more, " "), func(t *testing.T) {
			proxytest.Need(t, "dig")
			l := newLab(t)
			for family, gw := range originIP { // a machine without a way to an address asks no packet filter
				l.router.ip(t, "route", "add", "default", "via", gw)
				l.origin.echo(t, at(originIP[family], "5353"))
			}
			p := new(httpProxy)
			l.origin.serve(t, at(originIP[0], "3128"), p.serve)
			args := []string{"tproxy", "12345", "--setup", "--from", "local,lan0", "--dns", "fake", "--via", "http://" + at(originIP[0], "3128")}
			l.router.startSluice(t, append(args, more...)...)
			for _, from := range []namespace{l.client, l.router} {
				for family, typ := range []string{"A", "AAAA"} {
					name := strings.ToLower(typ) + "." + string(from[len(from)-6:]) + ".example"
					ip := from.dig(t, "@"+otherIP[family], name, typ) // where nobody is asked
					fake, err := netip.ParseAddr(ip)
					if over := from.dig(t, "+tcp", "@"+otherIP[family], strings.ToUpper(name), typ); over != ip || err != nil {
						t.Fatalf("%s of %s is %q, and %q over TCP", typ, name, ip, over)
					}
					if back := from.dig(t, "@"+otherIP[family], "-x", ip); back != name+"." {
						t.Errorf("%v is %q", fake, back)
					}
					if got := from.seen(t, at(ip, "80")); got != routerOutIP[0] {
						t.Errorf("%s at %s: %q", name, ip, got)
					}
					if !p.wasAsked(name + ":80") {
						t.Errorf("the proxy was not asked for %s, but for %q", name, p.asked)
					}
					none := from.mustDial(t, "udp", at(ip, "443"))
					none.SetDeadline(time.Now().Add(10 * time.Second))
					none.Write([]byte("x"))
					if _, err := none.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("datagrams that the way out does not carry: %v", err)
					}
					own := map[namespace][2]string{l.client: clientIP, l.router: routerOutIP}[from][family]
					c := from.mustDial(t, "udp", at(originIP[family], "5353"))
					c.Write([]byte("x"))
					b := make([]byte, 100)
					if n, err := c.Read(b); err != nil || string(b[:n]) != own+" x" {
						t.Errorf("datagrams to others: %q, %v", b[:n], err)
					}
				}
			}
		})
	}
}

// TestHijackedNames: with the address of a resolver, that is asked, whoever was meant.
func TestHijackedNames(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "dig")
	l := newLab(t)
	answer := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		r, _ := dns.NewRR(q.Question[0].Name + " 60 IN A 192.0.2.77")
		m.Answer = append(m.Answer, r)
		w.WriteMsg(m)
	})
	udp := &dns.Server{PacketConn: l.origin.packets(t, at(originIP[0], "53")), Handler: answer}
	var ln net.Listener
	if err := l.origin.in(func() (err error) {
		ln, err = net.Listen("tcp", at(originIP[0], "53"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	tcp := &dns.Server{Listener: ln, Handler: answer}
	for _, s := range []*dns.Server{udp, tcp} {
		go s.ActivateAndServe()
		t.Cleanup(func() { s.Shutdown() })
	}
	l.router.startSluice(t, "tproxy", "12345", "--setup", "--from", "local,lan0", "--dns", originIP[0])
	for _, from := range []namespace{l.client, l.router} {
		for _, way := range []string{"+notcp", "+tcp"} {
			for _, server := range otherIP {
				if got := from.dig(t, way, "@"+server, "some.example"); got != "192.0.2.77" {
					t.Errorf("%s %s from %s: %q", way, server, from, got)
				}
			}
		}
	}
}
