package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// network is two network namespaces of a test, joined by a cable. In host, sluice runs as if it were the machine's own. All
// that it can reach is in world: the LAN 10.77.0.0/24 and fd77::/64, and, by the default route, 203.0.113.1 and
// 2001:db8::1 with an HTTP server that says who asks, a name server that knows web.test, and a SOCKS5 proxy at 10.77.0.1:1080.
type network struct {
	t           *testing.T
	host, world string
}

var networks atomic.Int32

func newNetwork(t *testing.T) *network {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "ip", "curl", "dig", "dnsmasq", "ping")
	name := fmt.Sprintf("sluice-e2e-%d-%d", os.Getpid(), networks.Add(1))
	n := &network{t, name + "-host", name + "-world"}
	for _, ns := range []string{n.host, n.world} {
		n.add(ns)
		etc := filepath.Join("/etc/netns", ns)
		proxytest.Until(t, "a directory for it", func() bool { return os.MkdirAll(etc, 0o755) == nil }) // others remove /etc/netns
		t.Cleanup(func() { os.RemoveAll(etc); os.Remove("/etc/netns") })
		writeIn(t, etc, "resolv.conf", "nameserver 10.77.0.1\n")
	}
	n.ip("-n", n.host, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", n.world)
	for i, ns := range []string{n.world, n.host} {
		n.sh(ns, "cd /proc/sys/net/ipv6/conf && for i in all default eth0; do echo 0 >$i/accept_dad; done")
		n.ip("-n", ns, "link", "set", "lo", "up")
		n.ip("-n", ns, "link", "set", "eth0", "up")
		n.ip("-n", ns, "addr", "add", fmt.Sprintf("10.77.0.%d/24", i+1), "dev", "eth0")
		n.ip("-n", ns, "addr", "add", fmt.Sprintf("fd77::%d/64", i+1), "dev", "eth0")
	}
	proxytest.Until(t, "the kernel has set up eth0", func() bool {
		return strings.Contains(n.ip("-n", n.host, "link", "show", "eth0"), "state UP") &&
			strings.Contains(n.ip("-n", n.host, "-6", "route", "show", "table", "local"), "local fe80")
	})
	n.ip("-n", n.world, "addr", "add", "203.0.113.1", "dev", "lo")
	n.ip("-n", n.world, "addr", "add", "2001:db8::1", "dev", "lo")
	n.ip("-n", n.host, "route", "add", "default", "via", "10.77.0.1")
	n.ip("-n", n.host, "route", "add", "default", "via", "fd77::1")
	n.sh(n.host, "cd /proc/sys/net/ipv4/conf && for i in all eth0; do echo 1 >$i/rp_filter; done") // the strictest

	n.serve(":80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) }))
	n.start(n.world, "dnsmasq", "-k", "--no-resolv", "--no-hosts", "--pid-file=", "-u", "root",
		"--address=/web.test/203.0.113.1", "--address=/web.test/2001:db8::1")
	n.start(n.world, binary, "proxy", ":1080", "--open")
	proxytest.Until(t, "the name server answers", func() bool {
		return n.run(n.host, "dig", "+short", "+time=1", "+tries=1", "web.test").stdout != ""
	})
	proxytest.Until(t, "the proxy answers", func() bool {
		return n.run(n.host, "curl", "-q", "-sS", "-m", "1", "-x", "http://10.77.0.1:1080", "http://203.0.113.1/").code == 0
	})
	return n
}

// add makes a namespace for the test's time.
func (n *network) add(ns string) {
	n.t.Helper()
	n.ip("netns", "add", ns)
	file := filepath.Join("/run/netns", ns)
	var st syscall.Stat_t
	if err := syscall.Stat(file, &st); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { // with the records of who was killed since the test failed
		exec.Command("ip", "netns", "del", ns).Run()
		os.Remove(fmt.Sprintf("/run/sluice/tun-%d.json", st.Ino))
		os.Remove(fmt.Sprintf("/run/sluice/tun-%s.json", ns))
	})
}

func (n *network) ip(args ...string) string {
	n.t.Helper()
	r := runProgram(n.t, nil, "ip", args...)
	if r.code != 0 {
		n.t.Fatalf("ip %s: %s", strings.Join(args, " "), r.stderr)
	}
	return r.stdout
}

func (n *network) sh(ns, script string) { n.t.Helper(); n.ip("netns", "exec", ns, "sh", "-c", script) }

// run runs a program in a namespace to its end.
func (n *network) run(ns, name string, args ...string) result {
	n.t.Helper()
	return runProgram(n.t, nil, "ip", append([]string{"netns", "exec", ns, name}, args...)...)
}

// start starts a program in a namespace. Its process is the one that ip was.
func (n *network) start(ns, name string, args ...string) *process {
	n.t.Helper()
	return start(n.t, "ip", append([]string{"netns", "exec", ns, name}, args...)...)
}

// tun starts sluice tun in host, and waits until it has said so.
func (n *network) tun(args ...string) *process {
	n.t.Helper()
	p := n.start(n.host, binary, append([]string{"tun", "--grace", "1s"}, args...)...)
	proxytest.Until(n.t, "sluice tun is up", func() bool {
		select {
		case <-p.done:
			n.t.Fatalf("sluice ended: %v\n%s", p.err, p.log)
		default:
		}
		return strings.Contains(p.log.String(), "raffic of ")
	})
	n.t.Cleanup(func() {
		if log := p.log.String(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			n.t.Errorf("sluice wrote:\n%s", log)
		}
	})
	return p
}

// end signals a process and waits for its end with a code.
func (n *network) end(p *process, sig syscall.Signal, code int) {
	n.t.Helper()
	p.cmd.Process.Signal(sig)
	if got := p.exitCode(n.t, patience); got != code {
		n.t.Errorf("sluice ended with code %d, want %d:\n%s", got, code, p.log)
	}
}

// inside calls f on a thread that is in a namespace. Sockets that f opens stay there.
func (n *network) inside(ns string, f func() error) {
	n.t.Helper()
	done := make(chan error)
	go enter(ns, f, done)
	if err := <-done; err != nil {
		n.t.Fatal(err)
	}
}

func enter(ns string, f func() error, done chan<- error) {
	runtime.LockOSThread() // until it is back: a thread that ends takes the processes with it that it started (Pdeathsig)
	back, err := netns.Get()
	if err != nil {
		done <- err
		return
	}
	defer back.Close()
	h, err := netns.GetFromName(ns)
	if err == nil {
		defer h.Close()
		err = netns.Set(h)
	}
	if err == nil {
		err = f()
	}
	if netns.Set(back) == nil {
		runtime.UnlockOSThread()
	}
	done <- err
}

// listen listens in a namespace.
func (n *network) listen(ns, addr string) (ln net.Listener) {
	n.t.Helper()
	n.inside(ns, func() (err error) { ln, err = net.Listen("tcp", addr); return err })
	n.t.Cleanup(func() { ln.Close() })
	return ln
}

// dial connects in a namespace, from the local address if that is given.
func (n *network) dial(ns, from, to string) (c net.Conn) {
	n.t.Helper()
	d := net.Dialer{Timeout: patience}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	n.inside(ns, func() (err error) { c, err = d.Dial("tcp", to); return err })
	n.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func (n *network) serve(addr string, h http.Handler) {
	server := &http.Server{Handler: h}
	go server.Serve(n.listen(n.world, addr))
	n.t.Cleanup(func() { server.Close() })
}

// dump returns all of a namespace that sluice could change.
func (n *network) dump(ns string) string {
	n.t.Helper()
	var b strings.Builder
	for _, what := range []string{"rule", "-6 rule", "route show table all", "-6 route show table all", "addr", "link"} {
		fmt.Fprintf(&b, "== %s\n%s", what, n.ip(append([]string{"-n", ns}, strings.Fields(what)...)...))
	}
	for _, file := range []string{"/etc/resolv.conf", "/etc/netns/" + ns + "/resolv.conf"} {
		text, err := os.ReadFile(file)
		fmt.Fprintf(&b, "== %s %v\n%s", file, err, text)
	}
	return b.String()
}

func (n *network) same(ns, before string) {
	n.t.Helper()
	if after := n.dump(ns); after != before {
		n.t.Errorf("the network is not as before:\n%s\nbut:\n%s", before, after)
	}
}

// get fetches a URL in a namespace and returns what curl printed.
func (n *network) get(ns, url string) string {
	n.t.Helper()
	r := n.run(ns, "curl", "-q", "-sS", "-m", "10", url)
	if r.code != 0 {
		n.t.Errorf("curl %s: code %d, %s", url, r.code, r.stderr)
	}
	return r.stdout
}

func (n *network) dig(ns string, args ...string) string {
	n.t.Helper()
	return strings.TrimSpace(n.run(ns, "dig", append([]string{"+short", "+time=3", "+tries=2"}, args...)...).stdout)
}

// sessions returns how many of them a log has that went to dst.
func sessions(p *process, dst string) int { return strings.Count(p.log.String(), "dst="+dst+" ") }

// TestTUN: all traffic of the machine goes through, our own goes past, and in the end everything is as before.
func TestTUN(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		flags []string
		name4 string // what dig says of web.test, or how that begins
		seen  string // the name in the log; empty: its address
	}{
		{name: "direct", name4: "203.0.113.1"},
		{name: "fake addresses", flags: []string{"--via", "socks5://10.77.0.1:1080"}, name4: "198.1", seen: "web.test:80"},
		{name: "a resolver", flags: []string{"--via", "socks5://10.77.0.1:1080", "--dns", "203.0.113.1"}, name4: "203.0.113.1"},
		{name: "another mark", flags: []string{"--mark", "7"}, name4: "203.0.113.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t)
			before := n.dump(n.host)
			p := n.tun(tt.flags...)
			n.get(n.host, "http://203.0.113.1/")
			n.get(n.host, "http://[2001:db8::1]/")
			proxytest.Until(t, "both sessions are over", func() bool {
				return sessions(p, "203.0.113.1:80") == 1 && sessions(p, "[2001:db8::1]:80") == 1
			})
			if got := n.dig(n.host, "web.test"); !strings.HasPrefix(got, tt.name4) {
				t.Errorf("dig web.test: %s, want %s", got, tt.name4)
			}
			n.get(n.host, "http://web.test/")
			if tt.seen != "" {
				proxytest.Until(t, "a session to the name", func() bool { return sessions(p, tt.seen) > 0 })
			}
			for _, server := range []string{"203.0.113.1", "2001:db8::1"} {
				if got := n.dig(n.host, "@"+server, "web.test"); !strings.HasPrefix(got, tt.name4) {
					t.Errorf("dig @%s web.test: %s, want %s", server, got, tt.name4)
				}
			}
			if r := n.run(n.host, "curl", "-q", "-sS", "-m", "10", "http://203.0.113.1:81/"); r.code != 7 || !strings.Contains(r.stderr, "after") {
				t.Errorf("a refused connection: code %d, %s", r.code, r.stderr)
			}
			direct := !slices.Contains(tt.flags, "--via")
			for _, host := range []string{"203.0.113.1", "2001:db8::1"} { // an echo is never made up
				if r := n.run(n.host, "ping", "-c", "1", "-W", "2", host); (r.code == 0) != direct {
					t.Errorf("ping %s: code %d, %s", host, r.code, r.stdout)
				}
			}
			n.end(p, syscall.SIGTERM, 0)
			n.same(n.host, before)
		})
	}
}

// TestTUNNamespace: with --netns the traffic of that namespace goes in, and out of the one that sluice is in.
func TestTUNNamespace(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	lab := n.host + "-lab"
	n.add(lab)
	before, hostBefore := n.dump(lab), n.dump(n.host)
	p := n.tun("--netns", lab, "--via", "socks5://10.77.0.1:1080")
	n.same(n.host, hostBefore)
	for _, url := range []string{"http://203.0.113.1/", "http://[2001:db8::1]/"} {
		n.get(lab, url)
	}
	fake := n.dig(lab, "@192.0.2.53", "web.test")
	if !strings.HasPrefix(fake, "198.1") {
		t.Errorf("dig web.test: %s", fake)
	}
	n.get(lab, "http://"+fake+"/")
	proxytest.Until(t, "a session to the name", func() bool { return sessions(p, "web.test:80") == 1 })
	n.end(p, syscall.SIGTERM, 0)
	n.same(lab, before)
	n.same(n.host, hostBefore)

	// Whoever deletes the namespace does not harm us.
	p = n.tun("--netns", lab)
	n.ip("netns", "del", lab)
	n.end(p, syscall.SIGINT, 0)
}

// TestTUNKilled: after kill -9 the machine goes on without a TUN, and all is as before after a clean-up, or the end of the next.
func TestTUNKilled(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	flags := []string{"--via", "socks5://10.77.0.1:1080", "--exclude", "192.0.2.0/24,2001:db8:1::/48"}
	kill := func() {
		t.Helper()
		p := n.tun(flags...)
		n.get(n.host, "http://203.0.113.1/")
		p.cmd.Process.Kill()
		<-p.done
		if n.dump(n.host) == before {
			t.Error("nothing was left behind")
		}
		if got := n.get(n.host, "http://203.0.113.1/"); !strings.HasPrefix(got, "10.77.0.2:") {
			t.Errorf("the server sees %q", got)
		}
	}
	kill()
	if r := n.run(n.host, binary, "tun", "down"); r.code != 0 || !strings.HasPrefix(r.stdout, "Removed ") {
		t.Errorf("code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	n.same(n.host, before)
	if r := n.run(n.host, binary, "tun", "down"); r.code != 0 || r.stdout != "Nothing was left.\n" {
		t.Errorf("code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	kill()
	p := n.tun("--name", "other0")
	if !strings.Contains(p.log.String(), "removed what a killed sluice had left") {
		t.Errorf("no word of it:\n%s", p.log)
	}
	n.end(p, syscall.SIGHUP, 0)
	n.same(n.host, before)
}

// TestTUNKilledAnywhere: sluice is killed at any moment of its start, and one tun down, or the next start, finds all that is left.
func TestTUNKilledAnywhere(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	begin := time.Now()
	n.end(n.tun(), syscall.SIGTERM, 0)
	took := time.Since(begin)
	const times = 12
	partly := 0
	for i := range times {
		flags := []string{"--dns", "fake", "--exclude", "192.0.2.0/24,2001:db8:1::/48"}
		var p *process
		if i < times-1 {
			p = n.start(n.host, binary, append([]string{"tun"}, flags...)...)
			time.Sleep(took * time.Duration(i) / times) // it is killed whatever it has come to
		} else {
			p = n.tun(flags...)
		}
		p.cmd.Process.Kill()
		<-p.done
		if n.dump(n.host) != before {
			partly++
		}
		if i%4 == 0 {
			n.end(n.tun("--name", "other0"), syscall.SIGTERM, 0)
		} else if r := n.run(n.host, binary, "tun", "down"); r.code != 0 {
			t.Errorf("tun down: code %d: %s%s", r.code, r.stdout, r.stderr)
		}
		n.same(n.host, before)
	}
	if partly == 0 {
		t.Error("nothing was ever left behind")
	}
	t.Logf("%d of %d had left something", partly, times)
}

func TestTUNDeviceDeleted(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	p := n.tun("--via", "socks5://10.77.0.1:1080")
	c := n.dial(n.host, "", "203.0.113.1:80")
	n.ip("-n", n.host, "link", "del", "sluice0")
	if code := p.exitCode(t, patience); code != 1 || !strings.Contains(p.log.String(), "the TUN device was deleted") {
		t.Errorf("code %d:\n%s", code, p.log)
	}
	c.Close()
	n.same(n.host, before)
	n.get(n.host, "http://203.0.113.1/")
}

func TestTUNIncludeExclude(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.ip("-n", n.world, "addr", "add", "203.0.113.2", "dev", "lo")
	n.ip("-n", n.world, "addr", "add", "198.51.100.1", "dev", "lo")
	for name, flags := range map[string][]string{
		"exclude": {"--exclude", "203.0.113.2", "--exclude", "2001:db8::/32,198.51.100.0/24"},
		"include": {"--include", "203.0.113.0/24", "--exclude", "203.0.113.2"},
	} {
		p := n.tun(flags...)
		for _, host := range []string{"203.0.113.1", "203.0.113.2", "198.51.100.1", "[2001:db8::1]"} {
			n.get(n.host, "http://"+host+"/")
		}
		n.end(p, syscall.SIGTERM, 0)
		for host, want := range map[string]int{"203.0.113.1": 1, "203.0.113.2": 0, "198.51.100.1": 0, "[2001:db8::1]": 0} {
			if got := sessions(p, host+":80"); got != want {
				t.Errorf("%s: %d sessions to %s, want %d", name, got, host, want)
			}
		}
	}
}

// TestTUNOthersStay: connections that are there already, and those of who connects to this machine, go on as if nothing were.
func TestTUNOthersStay(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	ln := n.listen(n.host, ":2222")
	go serveEchoes(ln)
	older := n.dial(n.world, "203.0.113.1", "10.77.0.2:2222")
	ask := func(c net.Conn) {
		t.Helper()
		if _, err := io.WriteString(c, "ping"); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Error(err)
		}
	}
	ask(older)
	p := n.tun()
	ask(older)
	newer := n.dial(n.world, "203.0.113.1", "10.77.0.2:2222")
	ask(newer)
	n.end(p, syscall.SIGTERM, 0)
	ask(older)
	ask(newer)
}

func serveEchoes(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go echo(c.(*net.TCPConn))
	}
}

// TestTUNDrains: on a stop, connections through the device are given time, and new ones go past it.
func TestTUNDrains(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	ln := n.listen(n.world, "203.0.113.1:2222")
	go serveEchoes(ln)
	p := n.tun("--grace", "1m")
	c := n.dial(n.host, "", "203.0.113.1:2222")
	ask := func() error {
		if _, err := io.WriteString(c, "ping"); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	proxytest.Until(t, "sluice stops", func() bool { return strings.Contains(p.log.String(), "stopping: 1 session") })
	n.get(n.host, "http://203.0.113.1/")
	if got := sessions(p, "203.0.113.1:80"); got != 0 {
		t.Errorf("%d new sessions", got)
	}
	if err := ask(); err != nil {
		t.Error(err)
	}
	c.Close()
	if code := p.exitCode(t, patience); code != 0 {
		t.Errorf("code %d:\n%s", code, p.log)
	}
	n.same(n.host, before)
}

// TestTUNRefuses: what cannot work is said in a sentence, and leaves no trace.
func TestTUNRefuses(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	first := n.tun()
	up := n.dump(n.host)
	pid := first.cmd.Process.Pid
	busy := writeFile(t, "busy.yaml", "inbounds:\n  - {type: mixed, listen: 10.77.0.2:3128, open: true}\n  - {name: other0, type: tun}\n")
	for want, args := range map[string][]string{
		fmt.Sprintf("another sluice (pid %d) leads this network into sluice0: end it first (kill %d)", pid, pid): {"tun", "--name", "x0"},
		fmt.Sprintf("end it first (kill %d)", pid):                                                               {"tun", "down"},
		fmt.Sprintf("(kill %d): in use", pid):                                                                    {"run", busy},
	} {
		if r := n.run(n.host, binary, args...); r.code != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("%v: code %d: %s, want %q", args, r.code, r.stderr, want)
		}
	}
	n.same(n.host, up)
	n.end(first, syscall.SIGTERM, 0)

	before := n.dump(n.host)
	for want, args := range map[string][]string{
		"sluice: an interface eth0 is there already: choose another name":                      {"tun", "--name", "eth0"},
		"sluice: there is no network namespace nowhere (make it by `ip netns add nowhere`)":    {"tun", "--netns", "nowhere"},
		"is the one that this program runs in: leave it out":                                   {"tun", "--netns", n.host},
		`sluice: invalid argument "10.0.0.1/8" for "--include" flag`:                           {"tun", "--include", "10.0.0.1/8"},
		"sluice: --exclude: 10.0.0.0/8 is included, too":                                       {"tun", "--include", "10.0.0.0/8", "--exclude", "10.0.0.0/8"},
		`sluice: invalid argument "fke" for "--dns" flag: "fke" is neither fake, off, nor the`: {"tun", "--dns", "fke"},
	} {
		r := n.run(n.host, binary, args...)
		if !strings.Contains(r.stderr, want) || r.code == 0 {
			t.Errorf("%v: code %d: %s, want %q", args, r.code, r.stderr, want)
		}
	}
	n.same(n.host, before)

	const nobody = "65534"
	for _, args := range [][]string{{"tun"}, {"tun", "--netns", n.world}, {"tun", "down"}} {
		r := n.run(n.host, "setpriv", append([]string{"--reuid", nobody, "--regid", nobody, "--clear-groups", binary}, args...)...)
		if r.code != 1 || !strings.Contains(r.stderr, "needs CAP_NET_ADMIN: run as root, or run one command with all its traffic by `sluice exec`") {
			t.Errorf("%v: code %d: %s", args, r.code, r.stderr)
		}
	}
}

// TestTUNRouter: traffic of machines that use this one as their router goes in, too, through the strictest filter.
func TestTUNRouter(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	lan := n.lan()
	p := n.tun("--via", "socks5://10.77.0.1:1080")
	for _, url := range []string{"http://203.0.113.1/", "http://[2001:db8::1]/"} {
		n.get(lan, url)
	}
	if got := n.dig(lan, "@10.77.0.1", "web.test"); !strings.HasPrefix(got, "198.1") {
		t.Errorf("dig web.test: %s", got)
	}
	n.end(p, syscall.SIGTERM, 0)
	for _, client := range []string{"10.88.0.2", "[fd88::2]"} {
		if !strings.Contains(p.log.String(), "client="+client+":") {
			t.Errorf("no session of %s:\n%s", client, p.log)
		}
	}
}

// TestTUNReadOnlySettings: in a container that may not write to /proc/sys, with the strict filter that it has inherited.
func TestTUNReadOnlySettings(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	p := n.start(n.host, "unshare", "-m", "sh", "-ec", `mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$@"`,
		"sh", binary, "tun", "--via", "socks5://10.77.0.1:1080")
	proxytest.Until(t, "sluice has begun or ended", func() bool { return strings.Contains(p.log.String(), "\n") })
	n.get(n.host, "http://203.0.113.1/")
	n.get(n.host, "http://web.test/")
	n.end(p, syscall.SIGTERM, 0)
	if sessions(p, "web.test:80") != 1 {
		t.Errorf("sluice wrote:\n%s", p.log)
	}
	n.same(n.host, before)
}

// TestTUNManySignals: who presses Ctrl-C again and again has the program end at once, and the network as it was all the same.
func TestTUNManySignals(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	before := n.dump(n.host)
	for range 8 {
		p := n.tun("--dns", "fake", "--exclude", "192.0.2.0/24,2001:db8:1::/48")
		for range 6 {
			p.cmd.Process.Signal(syscall.SIGTERM)
			time.Sleep(300 * time.Microsecond) // so that each is one of its own
		}
		p.exitCode(t, patience)
		n.same(n.host, before)
	}
}
