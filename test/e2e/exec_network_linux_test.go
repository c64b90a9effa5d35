package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// namedUpstream starts a sluice as an upstream for which origin.test is this machine; other machines have never heard
// of the name. What it logs is in its log.
func namedUpstream(t *testing.T) (url string, s *sluice) {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "unshare")
	hosts := writeFile(t, "hosts", "127.0.0.1 origin.test\n")
	addr := freeAddr(t)
	s = startCommand(t, []string{addr}, []string{"unshare", "-m", "sh", "-ec",
		`mount --bind "$1" /etc/hosts; shift; exec "$@"`, "sh", hosts, binary, "proxy", addr})
	return "socks5://" + addr, s
}

// httpServer serves h at a port of loopback, and returns the port.
func httpServer(t *testing.T, h http.Handler) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	go server.Serve(ln)
	t.Cleanup(func() { server.Close() })
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

func says(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
}

// TestExecNamesGoUpstream: the upstream gets the name that the command has asked for, by whatever it asked: libc, Go
// without libc, or DNS itself.
func TestExecNamesGoUpstream(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "curl", "getent")
	via, up := namedUpstream(t)
	port := httpServer(t, says("hello"))
	u := userOf(t, "", "")
	wants(t, userCommand(u, "--via", via, "--", "curl", "-q", "-sS", "http://origin.test:"+port+"/"), "hello")
	if !strings.Contains(up.log.String(), "dst=origin.test:"+port+" ") {
		t.Errorf("the upstream has logged:\n%s", up.log)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go serveEcho(ln)
	_, port, _ = net.SplitHostPort(ln.Addr().String())
	wants(t, userCommand(u, "--via", via, static(t), "tcp", "origin.test:"+port), "hello\n")
}

// TestExecThroughSSH: an SSH server is a hop like any other, here one to a proxy that only it can reach.
func TestExecThroughSSH(t *testing.T) {
	t.Parallel()
	proxytest.NeedRoot(t)
	openDir(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) { proxytest.Echo(c) })
	s := proxytest.StartSSHD(t)
	via, _ := namedUpstream(t)
	cmd := exec.Command(binary, "exec", "--via", sshVia(s), "--via", via, static(t), "tcp", fmt.Sprintf("origin.test:%d", origin.Addr.Port))
	wants(t, cmd, "hello\n")
}

// TestExecDig: DNS is answered over UDP and TCP.
func TestExecDig(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "dig")
	via, _ := namedUpstream(t)
	u := userOf(t, "", "")
	for _, flag := range []string{"+notcp", "+tcp"} {
		code, out, errOut := outcome(t, userCommand(u, "--via", via, "dig", flag, "+short", "+tries=1", "origin.test"))
		if ip, err := netip.ParseAddr(strings.TrimSpace(out)); code != 0 || err != nil || !netip.MustParsePrefix("198.18.0.0/15").Contains(ip) {
			t.Errorf("dig %s: code %d, %s%s", flag, code, out, errOut)
		}
	}
}

// TestExecUDP: datagrams go through an upstream that takes them, and are refused, which is said once, where it does not.
func TestExecUDP(t *testing.T) {
	t.Parallel()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go echoDatagrams(c)
	_, port, _ := net.SplitHostPort(c.LocalAddr().String())
	via, _ := namedUpstream(t)
	u, client := userOf(t, "", ""), static(t)
	wants(t, userCommand(u, "--via", via, client, "udp", "origin.test:"+port), "hello\n")

	via = "http" + strings.TrimPrefix(via, "socks5")
	code, out, errOut := outcome(t, userCommand(u, "--via", via, "sh", "-c", client+" udp 192.0.2.1:99; "+client+" udp 192.0.2.1:99"))
	if code != 1 || strings.Count(out, "connection refused") != 2 || strings.Count(errOut, "carries no UDP") != 1 {
		t.Errorf("without UDP: code %d, %s%s", code, out, errOut)
	}
}

func echoDatagrams(c net.PacketConn) {
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		c.WriteTo(b[:n], from)
	}
}

// TestExecGit: a repository comes over HTTP.
func TestExecGit(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "git")
	dir := openDir(t)
	script := `git init -q repo && cd repo && echo text >file && git add file &&
git -c user.name=x -c user.email=x@x commit -qm one && git update-server-info`
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	port := httpServer(t, http.FileServer(http.Dir(dir)))
	via, _ := namedUpstream(t)
	clone := execCommand(t, "--via", via, "--", "git", "clone", "-q", "http://origin.test:"+port+"/repo/.git", "clone")
	clone.Dir = dir
	clone.Env = append(clone.Env, "HOME="+dir)
	wants(t, clone, "")
	if b, err := os.ReadFile(filepath.Join(dir, "clone", "file")); err != nil || string(b) != "text\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestExecApt: apt-get reads a list of packages, as the user and as root, for whom it changes to another user.
func TestExecApt(t *testing.T) {
	t.Parallel()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "apt-get")
	dir := openDir(t)
	files := map[string]string{"Packages": "Package: sluice-test\nVersion: 1\nArchitecture: all\nFilename: x.deb\nSize: 1\nSHA256: " +
		strings.Repeat("0", 64) + "\nDescription: none\n\n"}
	port := httpServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := files[filepath.Base(r.URL.Path)]
		if !ok {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, text)
	}))
	via, _ := namedUpstream(t)
	list := filepath.Join(dir, "list")
	if err := os.WriteFile(list, fmt.Appendf(nil, "deb [trusted=yes] http://origin.test:%s/ ./\n", port), 0o644); err != nil {
		t.Fatal(err)
	}
	script := `set -e; state=$(mktemp -d); chmod 755 $state; mkdir -p $state/lists/partial $state/cache/archives/partial
apt() { "$@" -o Dir::Etc::SourceList=` + list + ` -o Dir::Etc::SourceParts=/dev/null -o Dir::State=$state -o Dir::Cache=$state/cache \
	-o Dir::State::status=/dev/null -o Debug::NoLocking=1 -o Acquire::Languages=none -o Acquire::http::Proxy=DIRECT; }
apt apt-get update -qq; apt apt-cache policy sluice-test | grep Candidate; rm -rf $state`
	for name, cmd := range map[string]*exec.Cmd{
		"user": execCommand(t, "--via", via, "--", "sh", "-c", script),
		"root": exec.Command(binary, "exec", "--via", via, "--", "sh", "-c", script),
	} {
		if code, out, errOut := outcome(t, cmd); code != 0 || !strings.Contains(out, "Candidate: 1") {
			t.Errorf("%s: code %d, %s%s", name, code, out, errOut)
		}
	}
}

// TestExecPing: a ping is answered by the host that it is for, or not at all.
func TestExecPing(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "ping")
	n := newTestNetwork(t)
	sysctl := exec.Command("ip", "netns", "exec", n.name, "sh", "-c", "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range")
	if out, err := sysctl.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	hosts := filepath.Join(openDir(t), "hosts")
	if err := os.WriteFile(hosts, []byte(testAddr+" origin.test\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	u := userOf(t, n.name, "mount --bind "+hosts+" /etc/hosts")
	for _, host := range []string{testAddr, "2001:db8::1"} {
		code, out, errOut := outcome(t, userCommand(u, "ping", "-c", "1", "-W", "10", host))
		if code != 0 || !strings.Contains(out, "1 received") {
			t.Errorf("ping %s: code %d, %s%s", host, code, out, errOut)
		}
	}
	proxytest.Need(t, "dig")
	const byName = "ping -c 1 -W 10 $(dig +short origin.test) >/dev/null" // ping itself would look into the file
	wants(t, userCommand(u, "sh", "-c", byName), "")
	if code, out, _ := outcome(t, userCommand(u, "ping", "-c", "1", "-W", "1", "203.0.113.2")); code != 1 {
		t.Errorf("ping of nobody: code %d, %s", code, out)
	}
}

// TestExecNothingGoesPast: with an upstream that is not there, nothing of the command arrives anywhere, also not where sluice
// itself could go, and the command hears why.
func TestExecNothingGoesPast(t *testing.T) {
	t.Parallel()
	n := newTestNetwork(t)
	u, client := userOf(t, n.name, ""), static(t)
	ln := n.listen(t, testAddr)
	arrived := make(chan net.Conn, 1)
	go func() {
		if c, err := ln.Accept(); err == nil {
			arrived <- c
		}
	}()
	code, out, _ := outcome(t, userCommand(u, "--via", "socks5://127.0.0.1:9", client, "tcp", ln.Addr().String()))
	if code != 1 || !strings.Contains(out, "connection refused") {
		t.Errorf("code %d, %s", code, out)
	}
	select {
	case <-arrived:
		t.Error("a connection arrived although there is no upstream")
	default:
	}
}

// TestExecPassesOnTheRest: what a command has sent arrives, also if it has ended before that.
func TestExecPassesOnTheRest(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	got := make(chan int64, 1)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		time.Sleep(300 * time.Millisecond) // the command has ended by now, or is blocked
		n, _ := io.Copy(io.Discard, c)
		got <- n
	}()
	proxytest.Need(t, "bash")
	via, _ := namedUpstream(t)
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	wants(t, execCommand(t, "--via", via, "bash", "-c", fmt.Sprintf("head -c %d /dev/zero >/dev/tcp/origin.test/%s", size, port)), "")
	select {
	case n := <-got:
		if n != size {
			t.Errorf("%d of %d bytes arrived", n, size)
		}
	case <-time.After(patience):
		t.Error("nothing arrived")
	}
}
