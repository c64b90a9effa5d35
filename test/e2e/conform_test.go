package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// relayed is a relay that sluice conform is let loose on.
type relayed struct {
	name  string // in the table
	flags []string
	// start starts it, between listen and origin, and returns its processes. Where it is asked for
	// its origin, that is unused.
	start func(t *testing.T, listen, origin string) []*process
	// fails are some of the scenarios that it is known to fail. The quick test plays these and a few
	// more, and all if there are none.
	fails []string
}

// relayeds are the relays of docs/conformance.md, with settings that suit each.
func relayeds(t *testing.T, sluice string) []relayed {
	return []relayed{
		{name: "sluice forward", start: func(t *testing.T, listen, origin string) []*process {
			return []*process{startServer(t, listen, sluice, "forward", listen, origin)}
		}},
		{name: "sluice SOCKS5", flags: []string{"--socks5"}, start: func(t *testing.T, listen, _ string) []*process {
			return []*process{startServer(t, listen, sluice, "proxy", listen)}
		}},
		{name: "sluice CONNECT", flags: []string{"--connect"}, start: func(t *testing.T, listen, _ string) []*process {
			return []*process{startServer(t, listen, sluice, "proxy", listen)}
		}},
		{name: "sluice chain", flags: []string{"--socks5"}, start: func(t *testing.T, listen, _ string) []*process {
			next := freeAddr(t)
			last := startServer(t, next, sluice, "proxy", next)
			return []*process{startServer(t, listen, sluice, "proxy", listen, "--via", "http://"+next), last}
		}},
		{name: version(t, "HAProxy", "haproxy", "-v"), start: startHAProxy, fails: []string{"reset-idle/from-origin"}},
		{name: version(t, "nginx", "nginx", "-v"), start: startNginx, fails: []string{"reset-idle/from-origin"}},
		{name: version(t, "socat", "socat", "-V"), start: startSocat, fails: []string{"reset-idle/from-origin"}},
		{name: version(t, "OpenSSH -L", "ssh", "-V"), start: startSSH, fails: []string{"reset-idle/from-origin"}},
		{name: version(t, "Dante", "danted", "-v"), flags: []string{"--socks5"},
			start: startDante, fails: []string{"reset-idle/from-origin"}},
		{name: version(t, "microsocks", "dpkg-query", "-f", "${Version}", "-W", "microsocks"), flags: []string{"--socks5"},
			start: startMicrosocks, fails: []string{"half-close-silence/from-client"}},
	}
}

// version names a program with the first version in what it prints.
func version(t *testing.T, name, program string, args ...string) string {
	t.Helper()
	proxytest.Need(t, program)
	out, _ := exec.Command(program, args...).CombinedOutput()
	for word := range strings.FieldsFuncSeq(string(out), func(r rune) bool { return strings.ContainsRune(" /_-,+~\n", r) }) {
		word = strings.Trim(word, "v.")
		if strings.Contains(word, ".") && word[0] >= '0' && word[0] <= '9' {
			return name + " " + word
		}
	}
	return name
}

// TestConform runs sluice conform on real relays: it must find nothing in sluice, and in the others what they
// are known to do. With SLUICE_CONFORM set to a directory it plays everything in full and leaves its
// reports there, for docs/conformance.md: that is what make conform does.
func TestConform(t *testing.T) {
	dir := os.Getenv("SLUICE_CONFORM")
	if dir == "" {
		t.Parallel()
		for _, r := range relayeds(t, binary) {
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				if len(r.fails) == 0 {
					r.conform(t, binary, "--quick")
					return
				}
				r.conform(t, binary, "--quick", "--only", "half-close-silence")
				r.conform(t, binary, "--quick", "--only", "reset-idle")
			})
		}
		return
	}
	sluice := filepath.Join(t.TempDir(), "sluice") // without the race detector
	if out, err := exec.Command("go", "build", "-o", sluice, "../../cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("building sluice: %v\n%s", err, out)
	}
	runs, _ := strconv.Atoi(os.Getenv("SLUICE_CONFORM_RUNS"))
	only := os.Getenv("SLUICE_CONFORM_ONLY")
	for run := range max(runs, 1) {
		for i, r := range relayeds(t, sluice) {
			if !strings.Contains(r.name, only) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", r.name, run+1), func(t *testing.T) {
				report := r.conform(t, sluice, "--name", r.name)
				name := filepath.Join(dir, fmt.Sprintf("%02d-%d.json", i+1, run+1))
				if err := os.WriteFile(name, report, 0o600); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// conform starts the relay, tests it, and returns the report.
func (r *relayed) conform(t *testing.T, sluice string, flags ...string) []byte {
	listen, origin := freeAddr(t), freeAddr(t)
	args := append([]string{"conform", listen, "--json"}, flags...)
	args = append(args, r.flags...)
	if len(r.flags) == 0 {
		args = append(args, "--origin", origin)
	}
	for _, p := range r.start(t, listen, origin) {
		args = append(args, "--pid", strconv.Itoa(p.cmd.Process.Pid))
	}
	cmd := exec.CommandContext(t.Context(), sluice, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Run() // its code is 1 for all but sluice
	var report struct {
		Results []struct{ Name, Verdict, Reason string }
	}
	if err := json.Unmarshal(stdout.Bytes(), &report); err != nil || len(report.Results) == 0 {
		t.Fatalf("%s: no report: %v\n%s", cmd, err, &stderr)
	}
	known := make(map[string]bool)
	for _, name := range r.fails {
		known[name] = true
	}
	for _, res := range report.Results {
		switch {
		case known[res.Name] && res.Verdict == "pass":
			t.Errorf("%s passes %s, which it is known to fail", r.name, res.Name)
		case strings.HasPrefix(r.name, "sluice") && res.Verdict == "fail":
			t.Errorf("%s fails %s: %s", r.name, res.Name, res.Reason)
		}
	}
	return stdout.Bytes()
}

func startHAProxy(t *testing.T, listen, origin string) []*process {
	return []*process{startServer(t, listen, "haproxy", "-db", "-f", writeFile(t, "haproxy.cfg", fmt.Sprintf(`
global
	maxconn 4000
defaults
	mode tcp
	timeout connect 5s
	timeout client 1h
	timeout server 1h
	option clitcpka
	option srvtcpka
	clitcpka-idle 15s
	srvtcpka-idle 15s
listen relay
	bind %s
	server origin %s
`, listen, origin)))}
}

func startNginx(t *testing.T, listen, origin string) []*process {
	dir := t.TempDir()
	module := "load_module /usr/lib/nginx/modules/ngx_stream_module.so;"
	conf := writeIn(t, dir, "nginx.conf", fmt.Sprintf(`%s
daemon off;
pid %[2]s/nginx.pid;
error_log %[2]s/error.log error;
events { worker_connections 4000; }
stream {
	server {
		listen %[3]s so_keepalive=15s:15s:4;
		proxy_pass %[4]s;
		proxy_connect_timeout 5s;
		proxy_timeout 1h;
		proxy_half_close on;
		proxy_socket_keepalive on;
	}
}
`, module, dir, listen, origin))
	return []*process{startServer(t, listen, "nginx", "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", conf)}
}

func startSocat(t *testing.T, listen, origin string) []*process {
	host, port, _ := net.SplitHostPort(listen)
	const keepalive = ",nodelay,keepalive,keepidle=15,keepintvl=15,keepcnt=4"
	return []*process{startServer(t, listen, "socat", "-t", "3600",
		"TCP-LISTEN:"+port+",bind="+host+",fork,reuseaddr,backlog=1024"+keepalive, "TCP:"+origin+keepalive)}
}

// startSSH starts an sshd with keys of its own and a client that forwards listen through it.
func startSSH(t *testing.T, listen, origin string) []*process {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd insists on it
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	for _, key := range []string{"host", "client"} {
		r := runProgram(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "e2e", "-f", filepath.Join(dir, key))
		if r.code != 0 {
			t.Fatal(r.stderr)
		}
	}
	server := freeAddr(t)
	host, port, _ := net.SplitHostPort(server)
	conf := writeIn(t, dir, "sshd.conf", fmt.Sprintf(`ListenAddress %s
HostKey %[2]s/host
AuthorizedKeysFile %[2]s/client.pub
PidFile %[2]s/sshd.pid
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding local
UsePAM no
LogLevel ERROR
`, server, dir))
	pub, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		t.Fatal(err)
	}
	known := writeIn(t, dir, "known_hosts", fmt.Sprintf("[%s]:%s %s", host, port, pub))
	sshd, err := exec.LookPath("sshd") // it wants its whole path
	if err != nil {
		sshd = "sshd"
	}
	return []*process{
		startServer(t, server, sshd, "-D", "-e", "-f", conf),
		startServer(t, listen, "ssh", "-N", "-F", "none", "-L", listen+":"+origin, "-p", port,
			"-i", filepath.Join(dir, "client"), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
			"-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "StrictHostKeyChecking=yes",
			"-o", "UserKnownHostsFile="+known, "-o", "GlobalKnownHostsFile=none", me.Username+"@"+host),
	}
}

func startDante(t *testing.T, listen, _ string) []*process {
	host, port, _ := net.SplitHostPort(listen)
	conf := writeFile(t, "danted.conf", fmt.Sprintf(`
logoutput: stderr
internal: %s port = %s
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
socks pass { from: 0.0.0.0/0 to: 0/0 }
`, host, port))
	return []*process{startServer(t, listen, "danted", "-f", conf, "-p", writeFile(t, "pid", ""))}
}

func startMicrosocks(t *testing.T, listen, _ string) []*process {
	host, port, _ := net.SplitHostPort(listen)
	return []*process{startServer(t, listen, "microsocks", "-i", host, "-p", port)}
}
