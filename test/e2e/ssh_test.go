package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// sshVia is the hop that goes through s, with keys and settings of the test only.
func sshVia(s *proxytest.SSHD) string {
	return fmt.Sprintf("ssh://root@%v?identity-file=%s&known-hosts=%s&ssh-config=none", s.Addr, s.UserKey, s.KnownHosts)
}

// stops ends a sluice by SIGTERM, which must be a success.
func stops(t *testing.T, p *process) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exitCode(t, patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if strings.Contains(p.log.String(), "DATA RACE") {
		t.Error("data race")
	}
}

// said waits for a line of p's output that matches, and returns its first group.
func said(t *testing.T, p *process, line string) string {
	t.Helper()
	re := regexp.MustCompile(line)
	var found []string
	proxytest.Until(t, line, func() bool {
		found = re.FindStringSubmatch(p.log.String())
		return found != nil
	})
	return found[len(found)-1]
}

// replies sends a request through the relay at addr to an origin that answers after its end.
func replies(t *testing.T, network, addr string) {
	t.Helper()
	c, err := net.DialTimeout(network, addr, patience)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, "request")
	c.(interface{ CloseWrite() error }).CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "re: request" || err != nil {
		t.Errorf("%s: %q, %v", addr, got, err)
	}
}

func TestForwardAndReverseThroughSSH(t *testing.T) {
	t.Parallel()
	s := proxytest.StartSSHD(t)
	reply := proxytest.AfterEOF(func(b []byte) []byte { return append([]byte("re: "), b...) })
	origin, local := proxytest.Listen(t, "tcp", reply), proxytest.Listen(t, "unix", reply)

	at := freeAddr(t)
	p := startServer(t, at, binary, "forward", at, origin.Addr.String(), "--via", sshVia(s))
	replies(t, "tcp", at)
	stops(t, p)

	at = freeAddr(t)
	p = startServer(t, at, binary, "forward", at, "unix://"+local.Addr.Host, "--via", sshVia(s), "--keep")
	said(t, p, "SSH: connected")
	replies(t, "tcp", at)
	stops(t, p)

	p = start(t, binary, "reverse", "0", origin.Addr.String(), "--via", sshVia(s))
	at = said(t, p, `Forwarding (127\.0\.0\.1:[1-9]\d*) there to`)
	replies(t, "tcp", at)
	s.Kill()
	said(t, p, "connection lost; connecting again")
	s.Run()
	said(t, p, "connected again")
	proxytest.Until(t, "it listens again", func() bool { return isListening(at) })
	replies(t, "tcp", at)
	stops(t, p)

	far := filepath.Join(s.Dir, "far.sock")
	p = start(t, binary, "reverse", "unix://"+far, "unix://"+local.Addr.Host, "--via", sshVia(s))
	said(t, p, "Forwarding unix://"+far)
	replies(t, "unix", far)
	stops(t, p)
}

func TestProxyThroughSSH(t *testing.T) {
	t.Parallel()
	s := proxytest.StartSSHD(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		c.Read(make([]byte, 1000))
		io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nhello from the far side")
	})
	at := freeAddr(t)
	p := startServer(t, at, binary, "proxy", at, "--via", sshVia(s))
	for _, scheme := range []string{"socks5h", "http"} {
		r := runProgram(t, nil, "curl", "-sS", "-x", scheme+"://"+at, "http://"+origin.Addr.String()+"/")
		if r.stdout != "hello from the far side" {
			t.Errorf("%s: %+v", scheme, r)
		}
		refused := fmt.Sprintf("http://127.0.0.1:%d/", proxytest.FreePort(t))
		if r := runProgram(t, nil, "curl", "-sS", "-m", "10", "-f", "-x", scheme+"://"+at, refused); r.code == 0 {
			t.Errorf("%s: a closed port: %+v", scheme, r)
		}
	}
	said(t, p, "reason=refused")
	stops(t, p)
}

func TestReverseThatCannotListen(t *testing.T) {
	t.Parallel()
	s := proxytest.StartSSHD(t, "AllowTcpForwarding no")
	p := start(t, binary, "reverse", "0", "1", "--via", sshVia(s))
	if code := p.exitCode(t, patience); code != 1 {
		t.Errorf("exit code %d", code)
	}
	said(t, p, "cannot listen at 127.0.0.1:0 there: the server refuses")
	p = start(t, binary, "reverse", "0", "1")
	if code := p.exitCode(t, patience); code != 2 {
		t.Errorf("exit code %d", code)
	}
}

// TestSSHAsksAtTheTerminal: an unknown host key and a passphrase are asked for at the controlling
// terminal, what is secret is not shown, and the key is remembered.
func TestSSHAsksAtTheTerminal(t *testing.T) {
	t.Parallel()
	s := proxytest.StartSSHD(t)
	os.Remove(s.KnownHosts)
	locked := filepath.Join(s.Dir, "locked")
	proxytest.Keygen(t, locked, "-a", "1", "-N", "open sesame")
	s.Authorize(locked)
	s.UserKey = locked
	person, tty := openTerminal(t)
	var out output
	p := &process{cmd: exec.Command(binary, "reverse", "0", "1", "--via", sshVia(s)), log: &out, done: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, tty, tty
	p.cmd.SysProcAttr = diesWithUs(syscall.SysProcAttr{Setsid: true, Setctty: true})
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.wait()
	tty.Close()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		io.Copy(&out, person)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
		person.Close()
		<-copied
		if t.Failed() {
			t.Logf("the terminal shows:\n%s", out.String())
		}
	})
	said(t, p, `\(yes/no\) $`)
	io.WriteString(person, "yes\n")
	said(t, p, `Passphrase of \S+: $`)
	io.WriteString(person, "open sesame\n")
	said(t, p, `Forwarding 127\.0\.0\.1:\d+`)
	if strings.Contains(out.String(), "sesame") {
		t.Error("the passphrase is shown")
	}
	if b, err := os.ReadFile(s.KnownHosts); err != nil || !bytes.Contains(b, []byte("ssh-ed25519")) {
		t.Errorf("known hosts: %q, %v", b, err)
	}
	stops(t, p)
}

// TestPostgreSQLThroughSSH is the example of docs/ssh.md: a database behind a server, two clients.
func TestPostgreSQLThroughSSH(t *testing.T) {
	t.Parallel()
	s := proxytest.StartSSHD(t)
	port := startPostgreSQL(t)
	at := freeAddr(t)
	p := startServer(t, at, binary, "forward", at, fmt.Sprintf("localhost:%d", port), "--via", sshVia(s))
	host, service, _ := net.SplitHostPort(at)
	psql := func(sql string) string {
		out, err := exec.Command("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", host, "-p", service, "-U", "postgres", "-c", sql).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", sql, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	psql("CREATE TABLE sums (client int, n bigint)")
	var clients sync.WaitGroup
	for client := range 2 {
		clients.Go(func() {
			for range 3 {
				psql(fmt.Sprintf("INSERT INTO sums SELECT %d, g FROM generate_series(1, 10000) g", client))
				if got := psql("SELECT length(string_agg(repeat('x', 100), '')) FROM generate_series(1, 5000)"); got != "500000" {
					t.Errorf("an aggregate is %q", got)
				}
				if got := psql("SELECT repeat('data ', 100000)"); len(got) != 500000-1 { // 490 KiB through the tunnel
					t.Errorf("%d bytes", len(got))
				}
			}
		})
	}
	clients.Wait()
	if got := psql("SELECT client, count(*), sum(n) FROM sums GROUP BY client ORDER BY client"); got != "0|30000|150015000\n1|30000|150015000" {
		t.Errorf("the table holds %q", got)
	}
	if n := strings.Count(p.log.String(), "SSH: connected"); n != 1 {
		t.Errorf("%d SSH connections", n)
	}
	stops(t, p)
}

// startPostgreSQL starts a server of Debian's package with a cluster of its own, as the user postgres, and returns its port.
func startPostgreSQL(t *testing.T) uint16 {
	t.Helper()
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(bins) == 0 {
		proxytest.Need(t, "/usr/lib/postgresql/15/bin/initdb")
	}
	proxytest.Need(t, "psql")
	proxytest.NeedRoot(t)
	owner, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	dir, err := os.MkdirTemp("", "sluice-postgresql-") // t.TempDir is below a directory of root alone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	as := diesWithUs(syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}})
	bin, data := filepath.Dir(bins[len(bins)-1]), filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--no-locale")
	initdb.SysProcAttr, initdb.Dir = as, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	port := proxytest.FreePort(t)
	p := &process{log: new(output), done: make(chan struct{}), cmd: exec.Command(filepath.Join(bin, "postgres"), "-D", data,
		"-p", strconv.Itoa(int(port)), "-h", "127.0.0.1", "-k", dir, "-c", "fsync=off")}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.SysProcAttr, p.cmd.Dir = p.log, p.log, as, dir
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.wait()
	t.Cleanup(func() {
		p.cmd.Process.Signal(syscall.SIGINT) // fast shutdown: it ends its clients
		<-p.done
		if t.Failed() {
			t.Logf("postgres wrote:\n%s", tail(p.log.String(), 4000))
		}
	})
	proxytest.Until(t, "PostgreSQL accepts", func() bool { return strings.Contains(p.log.String(), "ready to accept connections") })
	return port
}
