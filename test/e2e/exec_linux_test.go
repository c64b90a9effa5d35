package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// somebody is who runs sluice exec in these tests: somebody without any rights.
const somebody = "65534"

// userOf returns a program that runs its arguments as that user, in the network namespace called netns (empty: this one). The
// user may open /dev/net/tun, which is not the user's business on all machines. setup, where there is any, is done
// as root before, in mounts of its own.
func userOf(t *testing.T, netns, setup string) string {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "unshare", "setpriv", "ip")
	dir := openDir(t)
	tun := filepath.Join(dir, "tun")
	if err := unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tun, 0o666); err != nil {
		t.Fatal(err)
	}
	if netns != "" {
		netns = "ip netns exec " + netns
	}
	const script = `#!/bin/sh
exec %s unshare -m sh -ec 'mount --bind %s /dev/net/tun
%s
exec setpriv --reuid %s --regid %s --clear-groups "$@"' sh "$@"
`
	name := filepath.Join(dir, "user")
	if err := os.WriteFile(name, fmt.Appendf(nil, script, netns, tun, setup, somebody, somebody), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

// openDir returns a temporary directory that everybody can use.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-exec-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, filepath.Dir(binary)} {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// execCommand returns sluice exec as it is run by the user.
func execCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return userCommand(userOf(t, "", ""), args...)
}

func userCommand(user string, args ...string) *exec.Cmd {
	cmd := exec.Command(user, append([]string{binary, "exec"}, args...)...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	cmd.WaitDelay = time.Second
	return cmd
}

// outcome runs cmd and returns its exit code and what it wrote.
func outcome(t *testing.T, cmd *exec.Cmd) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if strings.Contains(errOut.String(), "DATA RACE") {
		t.Errorf("sluice wrote:\n%s", errOut.String())
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

// wants runs cmd, which is to succeed and to write that.
func wants(t *testing.T, cmd *exec.Cmd, want string) {
	t.Helper()
	if code, out, errOut := outcome(t, cmd); code != 0 || out != want {
		t.Errorf("%s: code %d\n%s%s\nwant %s", strings.Join(cmd.Args[1:], " "), code, out, errOut, want)
	}
}

// TestExecIsTheCommand: what the command sees, but for its network, is what it would see without sluice.
func TestExecIsTheCommand(t *testing.T) {
	t.Parallel()
	dir := openDir(t)
	for script, want := range map[string]string{
		"pwd":            dir + "\n",
		"echo $VARIABLE": "value\n",
		"id -u; id -g":   somebody + "\n" + somebody + "\n",
		"cat":            "input",
		"cat <&7":        "file",
		"echo $0 $#":     "sh 0\n",
		"ulimit -Sn":     "123\n",
		"umask":          "0027\n",
		"grep Cap.[^n].: /proc/self/status | grep -v '0000000000000000' | grep -v CapBnd": "",
		"grep SigBlk /proc/self/status":                            "SigBlk:\t0000000000000000\n",
		"ls /sys/class/net >/dev/null; ls /proc/sys/net/ipv4/conf": "all\ndefault\nlo\nsluice0\n",
		"grep -v '^#' /etc/resolv.conf":                            "nameserver 198.18.0.2\nsearch .\n",
	} {
		cmd := exec.Command("/bin/sh", "-c", `ulimit -Sn 123; umask 027; exec "$@" 7<file`, "sh")
		inner := execCommand(t, "--", "sh", "-c", script+`; true`, "sh")
		cmd.Args, cmd.Env = append(cmd.Args, inner.Args...), append(inner.Env, "VARIABLE=value")
		cmd.Dir, cmd.Stdin = dir, strings.NewReader("input")
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("file"), 0o644); err != nil {
			t.Fatal(err)
		}
		wants(t, cmd, want)
	}
}

// TestExecEnds: the exit code is the command's, or that of env(1) where there is no command.
func TestExecEnds(t *testing.T) {
	t.Parallel()
	dir := openDir(t)
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("exit 5"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("exit 6"), 0o755); err != nil {
		t.Fatal(err)
	}
	orphan := filepath.Join(dir, "orphan")
	if err := os.WriteFile(orphan, []byte("#!/nonexistent\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"true"}, 0, ""},
		{[]string{"--", "sh", "-c", "exit 7"}, 7, ""},
		{[]string{"sh", "-c", "exit 255"}, 255, ""},
		{[]string{script}, 6, ""},
		{[]string{"no-such-command"}, 127, "sluice: no-such-command: executable file not found in $PATH\n"},
		{[]string{"/no/such/command"}, 127, "sluice: /no/such/command: no such file or directory\n"},
		{[]string{orphan}, 127, "sluice: " + orphan + ": no such file or directory\n"},
		{[]string{plain}, 126, "sluice: " + plain + ": permission denied\n"},
		{[]string{"/"}, 126, "sluice: /: is a directory\n"},
		{nil, 2, "sluice: exec: needs a COMMAND"},
		{[]string{"--via", "1.2.3.4", "true"}, 2, "sluice: --via: "},
		{[]string{"--dns", "here", "true"}, 2, "sluice: "},
	} {
		code, out, errOut := outcome(t, execCommand(t, tt.args...))
		if code != tt.code || out != "" || !strings.HasPrefix(errOut, tt.says) || tt.says == "" && errOut != "" {
			t.Errorf("%q: code %d, %q, %q; want %d, %q", tt.args, code, out, errOut, tt.code, tt.says)
		}
	}
}

// TestExecEndsBySignal: who waits for sluice sees the signal that ended the command.
func TestExecEndsBySignal(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGABRT} {
		cmd := execCommand(t, "sh", "-c", fmt.Sprintf("kill -%d $$", sig))
		_, _, errOut := outcome(t, cmd)
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !status.Signaled() || status.Signal() != sig || status.CoreDump() || errOut != "" {
			t.Errorf("%v: ended with %v, %q", sig, cmd.ProcessState, errOut)
		}
	}
}

// startEnclosed starts a shell script in an enclosure, and waits until it has written ready.
func startEnclosed(t *testing.T, script string) *process {
	t.Helper()
	cmd := execCommand(t, "sh", "-c", script)
	p := start(t, cmd.Path, cmd.Args[1:]...)
	proxytest.Until(t, "the command runs", func() bool { return strings.Contains(p.log.String(), "ready") })
	return p
}

// TestExecPassesSignals: a signal to sluice, from whoever has started it, is one to the command.
func TestExecPassesSignals(t *testing.T) {
	t.Parallel()
	for name, sig := range map[string]syscall.Signal{
		"TERM": syscall.SIGTERM, "HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT,
		"USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2, "WINCH": syscall.SIGWINCH, "ALRM": syscall.SIGALRM,
	} {
		p := startEnclosed(t, `trap 'echo got it; exit 9' `+name+`; echo ready; while :; do sleep 0.05; done`)
		p.cmd.Process.Signal(sig)
		if code := p.exitCode(t, patience); code != 9 || !strings.Contains(p.log.String(), "got it") {
			t.Errorf("SIG%s: code %d", name, code)
		}
	}
}

// TestExecOutlivesItsLog: the command is not killed because nobody reads what sluice has to say of it.
func TestExecOutlivesItsLog(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "curl")
	cmd := execCommand(t, "--log-level", "warn", "--via", "socks5://127.0.0.1:1", "sh", "-c",
		"exec 2>/dev/null; curl -sS http://192.0.2.1/; curl -sS http://192.0.2.1/; exit 7")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd.Stderr = w
	err = cmd.Run()
	w.Close()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Errorf("%v, and not code 7", err)
	}
}

// TestExecStopsWithTheCommand: a command that stops itself, as a shell by suspend, stops sluice, so that who waits for it
// sees that; and goes on when sluice is told to.
func TestExecStopsWithTheCommand(t *testing.T) {
	t.Parallel()
	p := startEnclosed(t, `echo ready; kill -STOP $$; echo goes on; exit 4`)
	proxytest.Until(t, "sluice stops", func() bool { return stateOf(p.cmd.Process.Pid) == "T" })
	p.cmd.Process.Signal(syscall.SIGCONT)
	if code := p.exitCode(t, patience); code != 4 || !strings.Contains(p.log.String(), "goes on") {
		t.Errorf("code %d", code)
	}
}

// stateOf returns the letter of a process's state, as ps does.
func stateOf(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) == 0 {
		return ""
	}
	return fields[0]
}

// childrenOf returns the children of a process.
func childrenOf(pid int) (children []int) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, name := range threads {
		b, _ := os.ReadFile(name)
		for word := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(word); err == nil {
				children = append(children, n)
			}
		}
	}
	return children
}

// TestExecDiesWithSluice: kill -9 of sluice is kill -9 of the command, and all that was made for it is gone.
func TestExecDiesWithSluice(t *testing.T) {
	t.Parallel()
	p := startEnclosed(t, `echo ready; while :; do sleep 0.05; done`)
	inside := childrenOf(p.cmd.Process.Pid)
	if len(inside) != 1 {
		t.Fatalf("sluice has the children %v", inside)
	}
	net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", inside[0]))
	own, ownErr := os.Readlink("/proc/self/ns/net")
	if err != nil || ownErr != nil || net == own {
		t.Fatalf("the command is in %s, the test in %s: %v, %v", net, own, err, ownErr)
	}
	p.cmd.Process.Kill()
	proxytest.Until(t, "the command is dead", func() bool {
		s := stateOf(inside[0])
		return s == "" || s == "Z"
	})
	proxytest.Until(t, "nobody is in its network", func() bool { return len(processesIn(net)) == 0 })
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte("sluice /etc")) {
		t.Errorf("mounts: %v\n%s", err, mounts)
	}
}

// processesIn returns the processes in a network namespace.
func processesIn(net string) (pids []string) {
	names, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, name := range names {
		if to, err := os.Readlink(name); err == nil && to == net {
			pids = append(pids, name)
		}
	}
	return pids
}

// static builds the client without cgo.
func static(t *testing.T) string {
	t.Helper()
	name := filepath.Join(openDir(t), "static")
	cmd := exec.Command("go", "build", "-o", name, "./testdata/static")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return name
}

// testNetwork is a network namespace with an address that is not loopback, where origins can be.
type testNetwork struct{ name string }

const testAddr = "203.0.113.1"

func newTestNetwork(t *testing.T) *testNetwork {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "ip")
	n := &testNetwork{fmt.Sprintf("sluice-exec-%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", n.name).Run() })
	for _, line := range []string{
		"netns add " + n.name, "-n " + n.name + " link set lo up",
		"-n " + n.name + " addr add " + testAddr + "/32 dev lo", "-n " + n.name + " addr add 2001:db8::1/128 dev lo nodad",
	} {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v\n%s", line, err, out)
		}
	}
	return n
}

// listen listens in the namespace.
func (n *testNetwork) listen(t *testing.T, host string) net.Listener {
	t.Helper()
	var ln net.Listener
	err := inNamespace("/run/netns/"+n.name, func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(host, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// TestExecDirect: without an upstream, sluice connects by itself, from outside.
func TestExecDirect(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "curl")
	n := newTestNetwork(t)
	u := userOf(t, n.name, "")
	client := static(t)
	for _, host := range []string{testAddr, "2001:db8::1"} {
		ln := n.listen(t, host)
		go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }))
		wants(t, userCommand(u, "curl", "-q", "-sS", "http://"+ln.Addr().String()+"/"), "hello")

		echo := n.listen(t, host)
		go serveEcho(echo)
		wants(t, userCommand(u, client, "tcp", echo.Addr().String()), "hello\n")

		gone := n.listen(t, host)
		addr := gone.Addr().String()
		gone.Close()
		code, out, _ := outcome(t, userCommand(u, client, "tcp", addr))
		if code != 1 || !strings.HasSuffix(out, "connect: connection refused\n") {
			t.Errorf("refused: code %d, %s", code, out)
		}
	}
}

func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() { proxytest.Echo(c); c.Close() }()
	}
}
