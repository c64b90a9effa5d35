//go:build unix

package proxytest

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// sshdPath is where OpenSSH's server is; it wants to be called by its full name.
const sshdPath = "/usr/sbin/sshd"

// SSHD is OpenSSH's server with keys and a configuration of its own. Root logs in, with the key UserKey.
type SSHD struct {
	Addr       proxy.Addr
	Dir        string // for files of the test; holds all that follows
	HostKey    string // private key file, ed25519; .pub beside it
	UserKey    string // private key file, ed25519; .pub beside it
	KnownHosts string // file that knows HostKey
	log        string
	config     string
	t          testing.TB
	cmd        *exec.Cmd
	ended      chan struct{}
}

// StartSSHD starts a server. The lines come first in its configuration, where the first value counts.
// It is stopped at the test's end.
func StartSSHD(t testing.TB, lines ...string) *SSHD {
	t.Helper()
	Need(t, sshdPath, "ssh-keygen")
	NeedRoot(t)
	os.MkdirAll("/run/sshd", 0o755) // where it lives without privileges
	dir := t.TempDir()
	s := &SSHD{
		Addr: proxy.TCP("127.0.0.1", FreePort(t)), Dir: dir, t: t,
		HostKey: filepath.Join(dir, "host"), UserKey: filepath.Join(dir, "user"),
		KnownHosts: filepath.Join(dir, "known_hosts"), log: filepath.Join(dir, "log"), config: filepath.Join(dir, "sshd_config"),
	}
	Keygen(t, s.HostKey)
	Keygen(t, s.UserKey)
	s.Know(s.HostKey)
	s.Authorize(s.UserKey)
	config := append(lines,
		"Port "+strconv.Itoa(int(s.Addr.Port)), "ListenAddress 127.0.0.1", "HostKey "+s.HostKey,
		"AuthorizedKeysFile "+filepath.Join(dir, "authorized"),
		"PermitRootLogin prohibit-password", "UsePAM no", "StrictModes no", "PidFile none", "MaxStartups 200",
		"LogLevel VERBOSE",
	)
	WriteFile(t, s.config, strings.Join(config, "\n")+"\n")
	t.Cleanup(s.Kill)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(s.log)
			t.Logf("sshd:\n%s", b[max(0, len(b)-4000):])
		}
	})
	s.Run()
	return s
}

// WriteFile writes a file that only we can read.
func WriteFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Keygen makes a key pair by ssh-keygen: file and file.pub, ed25519 and without a passphrase unless
// args, the flags of ssh-keygen, say otherwise.
func Keygen(t testing.TB, file string, args ...string) {
	t.Helper()
	all := []string{"-q", "-f", file, "-t", "ed25519", "-N", "", "-C", "of the test"}
	out, err := exec.Command("ssh-keygen", append(all, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen %q: %v\n%s", args, err, out)
	}
}

// Know adds the host key file.pub to KnownHosts, behind the words (such as @revoked) before it.
func (s *SSHD) Know(file string, markers ...string) {
	s.t.Helper()
	pub, err := os.ReadFile(file + ".pub")
	if err != nil {
		s.t.Fatal(err)
	}
	fields := strings.Fields(string(pub))
	line := strings.Join(append(markers, fmt.Sprintf("[127.0.0.1]:%d", s.Addr.Port), fields[0], fields[1]), " ")
	s.appendTo(s.KnownHosts, line)
}

// Authorize lets the key file.pub in.
func (s *SSHD) Authorize(file string) {
	s.t.Helper()
	pub, err := os.ReadFile(file + ".pub")
	if err != nil {
		s.t.Fatal(err)
	}
	s.appendTo(filepath.Join(s.Dir, "authorized"), strings.TrimSpace(string(pub)))
}

func (s *SSHD) appendTo(file, line string) {
	s.t.Helper()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, line); err != nil {
		s.t.Fatal(err)
	}
}

// Run starts the server again after Kill, and waits until it accepts.
func (s *SSHD) Run() {
	s.t.Helper()
	out := new(bytes.Buffer)
	s.cmd = exec.Command(sshdPath, "-D", "-f", s.config, "-E", s.log)
	s.cmd.Stdout, s.cmd.Stderr = out, out
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ended = make(chan struct{})
	go reap(s.cmd, s.ended)
	for deadline := time.Now().Add(Patience); ; time.Sleep(5 * time.Millisecond) {
		select {
		case <-s.ended:
			b, _ := os.ReadFile(s.log)
			s.t.Fatalf("sshd does not start: %s%s", out, b)
		default:
		}
		c, err := net.DialTimeout("tcp", s.Addr.HostPort(), time.Second)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("sshd does not accept")
		}
	}
}

// Kill kills the server and all its sessions.
func (s *SSHD) Kill() {
	s.Signal(syscall.SIGKILL)
	<-s.ended
}

// Signal sends sig to the server and all its sessions.
func (s *SSHD) Signal(sig syscall.Signal) {
	select {
	case <-s.ended:
		return
	default:
	}
	for _, pid := range append(descendants(s.cmd.Process.Pid), s.cmd.Process.Pid) {
		syscall.Kill(pid, sig)
	}
}

// descendants returns the processes that pid has started, and theirs.
func descendants(pid int) (all []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, f := range strings.Fields(string(b)) {
		if child, err := strconv.Atoi(f); err == nil {
			all = append(append(all, child), descendants(child)...)
		}
	}
	return all
}
