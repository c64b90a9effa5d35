package transparent

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// kinds are the two inbounds, with the flags that capture all there is.
var kinds = []struct {
	name string
	args []string
}{
	{"redirect", []string{"redirect", ":12346", "--setup", "--from", "local,lan0"}},
	{"tproxy", []string{"tproxy", "12345", "--setup", "--from", "local,lan0"}},
}

func at(ip, port string) string { return net.JoinHostPort(ip, port) }

// TestWays: clients on a LAN and on the machine itself get where they want to go, over both families, and hear what they would
// hear without a proxy.
func TestWays(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			for _, ip := range originIP {
				l.origin.serve(t, at(ip, "8080"), greet)
				l.origin.serve(t, at(ip, "8081"), func(c net.Conn) {
					io.ReadAll(c)
					io.WriteString(c, "late")
				})
				l.origin.serve(t, at(ip, "8082"), func(c net.Conn) { c.(*net.TCPConn).SetLinger(0) })
			}
			s := l.router.startSluice(t, kind.args...)
			for family, ip := range originIP {
				for _, from := range []namespace{l.client, l.router} {
					if got := from.seen(t, at(ip, "8080")); got != routerOutIP[family] {
						t.Errorf("from %s the origin at %s sees %q, not the router", from, ip, got)
					}
					c := from.mustDial(t, "tcp", at(ip, "8081"))
					c.(*net.TCPConn).CloseWrite()
					if b, err := io.ReadAll(c); string(b) != "late" || err != nil {
						t.Errorf("after a half-close: %q, %v", b, err)
					}
					if got := from.seen(t, at(ip, "8082")); got != reason(syscall.ECONNRESET) {
						t.Errorf("a reset by the origin is %q", got)
					}
					if got := from.seen(t, at(ip, "9")); got != reason(syscall.ECONNRESET) {
						t.Errorf("a refusal is %q", got)
					}
				}
				proxytest.Until(t, "the log tells the client's own address", func() bool {
					return strings.Contains(s.log.String(), "client="+strings.TrimSuffix(at2(clientIP[family]), ":"))
				})
			}
		})
	}
}

// at2 writes an address as an address and port begin.
func at2(ip string) string { return strings.TrimSuffix(net.JoinHostPort(ip, ""), "") }

// TestUndone: at exit, and after kill -9 and one cleanup, the router's network is what it was, byte for byte.
func TestUndone(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			l.origin.serve(t, at(originIP[0], "8080"), greet)
			l.router.run(t, "nft", "add table inet other; add chain inet other output { type filter hook output priority 0; }; "+
				"add rule inet other output counter comment \"not ours\"")
			l.router.ip(t, "rule", "add", "fwmark", "7", "lookup", "777", "priority", "100")
			count := func(s string) string { // other's counter counts
				before, rest, _ := strings.Cut(s, "counter packets ")
				_, after, _ := strings.Cut(rest, "comment")
				return before + after
			}
			before := count(l.router.network(t))
			same := func(when string) {
				t.Helper()
				if after := count(l.router.network(t)); after != before {
					t.Errorf("%s the network is\n%s\nand was\n%s", when, after, before)
				}
			}

			s := l.router.startSluice(t, kind.args...)
			if count(l.router.network(t)) == before {
				t.Fatal("nothing was set up")
			}
			s.stop(t, syscall.SIGTERM)
			same("after SIGTERM")

			s = l.router.startSluice(t, kind.args...)
			if out := l.router.run(t, binary, "tproxy", "down"); out != "There is nothing to remove\n" {
				t.Errorf("down, while sluice runs: %s", out)
			}
			if got := l.client.seen(t, at(originIP[0], "8080")); got != routerOutIP[0] {
				t.Errorf("after down, while sluice runs, the origin sees %q", got)
			}
			s.stop(t, syscall.SIGKILL)
			if rules := l.router.rules(t); strings.Contains(rules, "sluice") {
				t.Errorf("after kill -9 there is\n%s", rules)
			}
			for _, from := range []namespace{l.client, l.router} {
				if got := from.seen(t, at(originIP[0], "8080")); strings.Contains(got, " ") {
					t.Errorf("after kill -9 the network does not work: %s", got)
				}
			}
			l.router.startSluice(t, kind.args...).stop(t, syscall.SIGTERM)
			same("after kill -9, a start and a stop")

			l.router.startSluice(t, kind.args...).stop(t, syscall.SIGKILL)
			out := l.router.run(t, binary, "tproxy", "down")
			if kind.name == "tproxy" && out != "Removed the routing of sluice tproxy 12345\n" {
				t.Errorf("down: %s", out)
			}
			same("after kill -9 and down")
		})
	}
}

// TestManySignals: who presses Ctrl-C again and again has the program end at once, and the network as it was all the same.
func TestManySignals(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			before := l.router.network(t)
			for range 5 {
				s := l.router.startSluice(t, kind.args...)
				for range 6 {
					s.cmd.Process.Signal(syscall.SIGTERM)
					time.Sleep(300 * time.Microsecond) // so that each is one of its own
				}
				<-s.done
				if after := l.router.network(t); after != before {
					t.Errorf("the network is\n%s\nand was\n%s", after, before)
				}
			}
		})
	}
}

// TestFailureLeavesNothing: what cannot be set up in full is not set up at all.
func TestFailureLeavesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	before := l.router.network(t)
	l.router.run(t, "nft", "add table inet sluice-tproxy-12345")
	out, _ := exec.Command("ip", "netns", "exec", string(l.router), binary, "tproxy", "12345", "--setup").CombinedOutput()
	if want := "there is a table sluice-tproxy-12345 already"; !strings.Contains(string(out), want) {
		t.Errorf("got %q, want %q", out, want)
	}
	l.router.run(t, "nft", "delete table inet sluice-tproxy-12345")
	l.router.serve(t, "127.0.0.1:12346", greet)
	out, _ = exec.Command("ip", "netns", "exec", string(l.router), binary, "redirect", "12346", "--setup").CombinedOutput()
	if want := "127.0.0.1:12346 is in use by"; !strings.Contains(string(out), want) {
		t.Errorf("got %q, want %q", out, want)
	}
	for _, kind := range []string{"redirect", "tproxy"} {
		cmd := exec.Command("ip", "netns", "exec", string(l.router),
			"setpriv", "--reuid=65534", "--clear-groups", binary, kind, "1999", "--setup")
		out, err := cmd.CombinedOutput()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 || !strings.Contains(string(out), "CAP_NET_ADMIN") {
			t.Errorf("%s without rights: %v, %q", kind, err, out)
		}
	}
	if after := l.router.network(t); after != before {
		t.Errorf("the network is\n%s\nand was\n%s", after, before)
	}
}

// TestSelection: --from, --include and --exclude say what is captured.
func TestSelection(t *testing.T) {
	t.Parallel()
	const lan, local = 1, 2
	for _, kind := range []string{"redirect", "tproxy"} {
		t.Run(kind, func(t *testing.T) {
			l := newLab(t)
			for family := range 2 {
				l.origin.serve(t, at(originIP[family], "8080"), greet)
				l.origin.serve(t, at(otherIP[family], "8080"), greet)
			}
			for _, tt := range []struct {
				flags           []string
				origin4, other4 int // who is captured
				origin6         int
			}{
				{nil, local, local, local},
				{[]string{"--from", "lan0"}, lan, lan, lan},
				{[]string{"--from", "10.9.1.0/24"}, lan, lan, 0},
				{[]string{"--from", "10.9.1.3,fd09:1::/64"}, 0, 0, lan},
				{[]string{"--from", "local,lan0", "--include", "10.9.2.2"}, lan | local, 0, 0},
				{[]string{"--from", "local,lan0", "--exclude", "10.9.2.2"}, 0, lan | local, lan | local},
				{[]string{"--from", "local,lan0", "--include", "10.9.2.0/24", "--exclude", "10.9.2.3"}, lan | local, 0, 0},
			} {
				t.Run(strings.Join(tt.flags, " "), func(t *testing.T) {
					s := l.router.startSluice(t, append([]string{kind, ":12347", "--setup"}, tt.flags...)...)
					check := func(ip string, want int) {
						t.Helper()
						got := 0
						for who, from := range map[int]namespace{lan: l.client, local: l.router} {
							c := from.mustDial(t, "tcp", at(ip, "8080"))
							if _, err := greeting(c); err != nil {
								t.Error(err)
							}
							own := "client=" + c.LocalAddr().String()
							c.Close()
							if strings.Contains(s.log.String(), own) || logs(s, own) {
								got |= who
							}
						}
						if got != want {
							t.Errorf("to %s those are captured: %b, want %b", ip, got, want)
						}
					}
					check(originIP[0], tt.origin4)
					check(otherIP[0], tt.other4)
					check(originIP[1], tt.origin6)
					s.stop(t, syscall.SIGTERM)
				})
			}
		})
	}
}

// logs waits a short while for the log to say something: it is written behind the session.
func logs(s *sluice, text string) bool {
	for range 30 {
		if strings.Contains(s.log.String(), text) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// TestDirect: who connects to the port itself is refused, from anywhere, and that is said once.
func TestDirect(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			port := strings.TrimPrefix(kind.args[1], ":")
			s := l.router.startSluice(t, kind.args...)
			for _, ip := range []string{"127.0.0.1", "::1"} {
				if got := l.router.seen(t, at(ip, port)); got != reason(syscall.ECONNRESET) {
					t.Errorf("a client at %s gets %q", ip, got)
				}
			}
			for _, ip := range []string{routerIP[0], routerIP[1], routerOutIP[0]} { // tproxy is on loopback only
				if got := l.client.seen(t, at(ip, port)); got != reason(syscall.ECONNRESET) && got != reason(syscall.ECONNREFUSED) {
					t.Errorf("a client of %s gets %q", ip, got)
				}
			}
			proxytest.Until(t, "that is said", func() bool { return strings.Contains(s.log.String(), "no destination") })
			if n := strings.Count(s.log.String(), "it has no destination but this inbound"); n != 1 {
				t.Errorf("that is said %d times", n)
			}
		})
	}
}

// TestThoseBefore: connections that were there before are not touched, at the beginning and at the end.
func TestThoseBefore(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			l.origin.serve(t, at(originIP[0], "8080"), greet)
			l.router.serve(t, at(routerIP[0], "8080"), greet) // as an sshd by which one has come
			conns := []net.Conn{
				l.client.mustDial(t, "tcp", at(originIP[0], "8080")),
				l.router.mustDial(t, "tcp", at(originIP[0], "8080")),
				l.client.mustDial(t, "tcp", at(routerIP[0], "8080")),
			}
			for i, c := range conns {
				if _, err := greeting(c); err != nil {
					t.Fatal(i, err)
				}
			}
			goOn := func(when string) {
				t.Helper()
				for i, c := range conns {
					io.WriteString(c, "x")
					if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
						t.Errorf("%s conn %d: %v", when, i, err)
					}
				}
			}
			s := l.router.startSluice(t, kind.args...)
			goOn("with sluice")
			conns = append(conns, l.client.mustDial(t, "tcp", at(routerIP[0], "8080")))
			if _, err := greeting(conns[3]); err != nil {
				t.Error("to the router itself:", err)
			}
			s.stop(t, syscall.SIGTERM)
			goOn("without sluice again")
		})
	}
}

// TestGrace: when sluice is to stop, sessions go on, and new connections go without it.
func TestGrace(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			l.origin.serve(t, at(originIP[0], "8080"), greet)
			before := l.router.network(t)
			s := l.router.startSluice(t, kind.args...)
			c := l.client.mustDial(t, "tcp", at(originIP[0], "8080"))
			greeting(c)
			s.cmd.Process.Signal(syscall.SIGTERM)
			proxytest.Until(t, "new connections go without sluice", func() bool {
				return l.client.seen(t, at(originIP[0], "8080")) == clientIP[0]
			})
			io.WriteString(c, "x")
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Error(err)
			}
			c.Close()
			s.stop(t, syscall.SIGTERM)
			if after := l.router.network(t); after != before {
				t.Errorf("the network is\n%s\nand was\n%s", after, before)
			}
		})
	}
}

// TestUpstream: the connections to an upstream proxy are not captured themselves.
func TestUpstream(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			l.origin.serve(t, at(otherIP[0], "8080"), greet)
			l.origin.startSluice(t, "proxy", at(originIP[0], "1080"), "--open")
			s := l.router.startSluice(t, append(kind.args, "--via", "socks5://"+at(originIP[0], "1080"))...)
			for _, from := range []namespace{l.client, l.router} {
				if got := from.seen(t, at(otherIP[0], "8080")); got != otherIP[0] && got != originIP[0] {
					t.Errorf("the origin sees %q, and not the upstream", got)
				}
			}
			if n := strings.Count(s.log.String(), "msg=session"); n > 2 {
				t.Errorf("there were %d sessions", n)
			}
		})
	}
}

// TestSplice: what a reader has not taken yet waits in a pipe, so the bytes go through the kernel alone.
func TestSplice(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			l := newLab(t)
			var sent atomic.Int64
			l.origin.serve(t, at(originIP[0], "8080"), func(c net.Conn) {
				for zeros := make([]byte, 64<<10); ; {
					n, err := c.Write(zeros)
					if sent.Add(int64(n)); err != nil {
						return
					}
				}
			})
			s := l.router.startSluice(t, kind.args...)
			before := s.pipes(t)
			c := l.client.mustDial(t, "tcp", at(originIP[0], "8080"))
			proxytest.Until(t, "sluice holds a pipe", func() bool {
				// It takes to splicing where it finds much to read. That is certain once all buffers on the way are
				// full: then it goes on from a full one whenever the client reads.
				if _, err := io.CopyN(io.Discard, c, 4<<20); err != nil {
					t.Fatalf("when the origin had sent %d bytes: %v", sent.Load(), err)
				}
				for was := int64(-1); was != sent.Load(); time.Sleep(30 * time.Millisecond) {
					was = sent.Load()
				}
				return s.pipes(t) > before
			})
		})
	}
}

// pipes is how many ends of pipes the program has open.
func (s *sluice) pipes(t *testing.T) (n int) {
	fds, err := proxytest.Descriptors(s.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if strings.Contains(fd, " pipe:") {
			n++
		}
	}
	return n
}

// TestByHand: the rules that the manual has for those who set them up themselves work.
func TestByHand(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/transparent.md")
	if err != nil {
		t.Fatal(err)
	}
	_, page, _ = bytes.Cut(page, []byte("## With rules of your own"))
	var blocks []string // a command, its rules, another, its rules, their routing
	for i, block := range strings.Split(string(page), "```\n") {
		if i%2 == 1 {
			blocks = append(blocks, block)
		}
	}
	if len(blocks) != 5 {
		t.Fatalf("%d blocks of code", len(blocks))
	}
	for i, tt := range []struct {
		name string
		args []string
		from func(l *lab) namespace
	}{
		{"redirect", []string{"redirect", "12346", "--mark", "7"}, func(l *lab) namespace { return l.router }},
		{"tproxy", []string{"tproxy", "12345"}, func(l *lab) namespace { return l.client }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.origin.serve(t, at(originIP[0], "8080"), greet)
			if command, _, _ := strings.Cut(blocks[2*i], " --via"); command != "sluice "+strings.Join(tt.args, " ") {
				t.Fatalf("the manual says %q", command)
			}
			l.router.run(t, "nft", blocks[2*i+1])
			if i == 1 {
				l.router.run(t, "sh", "-ec", blocks[4])
			}
			s := l.router.startSluice(t, tt.args...)
			if got := tt.from(l).seen(t, at(originIP[0], "8080")); got != routerOutIP[0] {
				t.Errorf("the origin sees %q", got)
			}
			proxytest.Until(t, "the session is logged", func() bool { return strings.Contains(s.log.String(), "msg=session") })
		})
	}
}

// TestDatagrams: tproxy carries datagrams, from and to the addresses that their ends know.
func TestDatagrams(t *testing.T) {
	t.Parallel()
	for _, listen := range []string{"12345", ":12345"} {
		t.Run(listen, func(t *testing.T) { testDatagrams(t, listen) })
	}
}

func testDatagrams(t *testing.T, listen string) {
	l := newLab(t)
	for family := range 2 {
		l.origin.echo(t, at(originIP[family], "5353"))
		l.origin.echo(t, at(otherIP[family], "5353"))
	}
	s := l.router.startSluice(t, "tproxy", listen, "--setup", "--from", "local,lan0")
	for family := range 2 {
		for _, from := range []namespace{l.client, l.router} {
			c := from.packets(t, ":0")
			for _, ip := range []string{originIP[family], otherIP[family], originIP[family]} {
				to, _ := net.ResolveUDPAddr("udp", at(ip, "5353"))
				c.WriteTo([]byte("question"), to)
				b := make([]byte, 100)
				n, peer, err := c.ReadFrom(b)
				if want := routerOutIP[family] + " question"; err != nil || string(b[:n]) != want || peer.String() != to.String() {
					t.Errorf("from %v: %q, %v, want %q from %v", peer, b[:n], err, want, to)
				}
			}
			none := from.mustDial(t, "udp", at(originIP[family], "9"))
			none.Write([]byte("x"))
			if _, err := none.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("nobody is there: %v", err)
			}
		}
	}
	big := l.client.mustDial(t, "udp", at(originIP[0], "5353"))
	sent := strings.Repeat("x", 60000)
	io.WriteString(big, sent)
	b := make([]byte, 65536)
	if n, err := big.Read(b); string(b[:n]) != routerOutIP[0]+" "+sent {
		t.Errorf("a large datagram: %d bytes, %v", n, err)
	}
	s.stop(t, syscall.SIGTERM)
}

// packets opens a UDP socket in ns until the test's end.
func (ns namespace) packets(t *testing.T, addr string) (c net.PacketConn) {
	t.Helper()
	if err := ns.in(func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	return c
}

// echo answers datagrams with the address that they came from, and what they said.
func (ns namespace) echo(t *testing.T, addr string) {
	t.Helper()
	c := ns.packets(t, addr)
	go func() {
		b := make([]byte, 65536)
		for {
			n, peer, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(peer.String())
			c.WriteTo([]byte(host+" "+string(b[:n])), peer)
		}
	}()
}
