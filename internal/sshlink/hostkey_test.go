//go:build unix

package sshlink

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// fingerprint returns what ssh-keygen says is that of file.pub.
func fingerprint(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("ssh-keygen", "-l", "-f", file+".pub").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))[1]
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// refusesKey checks that l does not trust its server, and that the error has the words.
func refusesKey(t *testing.T, l *Link, words ...string) {
	t.Helper()
	err := echoes(t, l)
	if _, ok := errors.AsType[*HostKeyError](err); !ok || !errors.Is(err, syscall.EACCES) {
		t.Fatalf("want a HostKeyError, got %v", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("no %q in: %v", w, err)
		}
	}
}

func TestUnknownHostKeyIsRefusedWithoutATerminal(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	os.Remove(s.KnownHosts)
	l, _ := newLink(t, s)
	refusesKey(t, l, "not known", fingerprint(t, s.HostKey), "no terminal", "ssh -p")
	if _, err := os.Stat(s.KnownHosts); err == nil {
		t.Error("the key was remembered")
	}
	l, _ = newLink(t, s, "StrictHostKeyChecking yes")
	l.Prompt = &typist{rules: [][2]string{{"", "yes"}}}
	refusesKey(t, l, "StrictHostKeyChecking")
}

func TestUnknownHostKeyIsAskedOnce(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, hashed := range []string{"no", "yes"} {
		s := proxytest.StartSSHD(t)
		proxytest.WriteFile(t, s.KnownHosts, "# a last line without an end")
		l, _ := newLink(t, s, "HashKnownHosts "+hashed)
		person := &typist{rules: [][2]string{{"is not known yet", "maybe"}, {"yes or no", "yes"}}}
		l.Prompt = person
		if err := echoes(t, l); err != nil {
			t.Fatal(err)
		}
		if q := person.asked; len(q) != 2 || !strings.Contains(q[0], fingerprint(t, s.HostKey)) {
			t.Errorf("asked %q", q)
		}
		if got := read(t, s.KnownHosts); strings.Contains(got, "127.0.0.1") == (hashed == "yes") {
			t.Errorf("hashed %s: %s", hashed, got)
		}
		// ssh-keygen finds it, and we do.
		if out, err := exec.Command("ssh-keygen", "-F", fmt.Sprintf("[%s]:%d", s.Addr.Host, s.Addr.Port), "-f", s.KnownHosts).Output(); err != nil || len(out) == 0 {
			t.Errorf("ssh-keygen -F: %q, %v", out, err)
		}
		l, _ = newLink(t, s)
		if err := echoes(t, l); err != nil {
			t.Error(err)
		}
	}
}

func TestHostKeyThatAPersonRefuses(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	os.Remove(s.KnownHosts)
	l, _ := newLink(t, s)
	person := &typist{rules: [][2]string{{"", "no"}}}
	l.Prompt = person
	refusesKey(t, l, "not accepted")
	refusesKey(t, l, "not accepted")
	if n := person.count(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestAcceptNew(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	os.Remove(s.KnownHosts)
	l, _ := newLink(t, s, "StrictHostKeyChecking accept-new")
	if err := echoes(t, l); err != nil || !strings.Contains(read(t, s.KnownHosts), "ssh-ed25519") {
		t.Errorf("%v, %s", err, read(t, s.KnownHosts))
	}
}

func TestChangedHostKeyIsRefused(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	other := filepath.Join(s.Dir, "other")
	proxytest.Keygen(t, other)
	proxytest.WriteFile(t, s.KnownHosts, "# a comment\n")
	s.Know(other)
	for _, strict := range []string{"ask", "accept-new", "no"} {
		l, _ := newLink(t, s, "StrictHostKeyChecking "+strict)
		l.Prompt = &typist{rules: [][2]string{{"", "yes"}}}
		refusesKey(t, l, "HAS CHANGED", fingerprint(t, s.HostKey), fingerprint(t, other), s.KnownHosts+":2")
	}
}

func TestRevokedHostKeyIsRefused(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	s.Know(s.HostKey, "@revoked")
	l, _ := newLink(t, s, "StrictHostKeyChecking no")
	refusesKey(t, l, "revoked", fingerprint(t, s.HostKey), s.KnownHosts+":2")
}

func TestMalformedKnownHosts(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	good := read(t, s.KnownHosts)
	for _, bad := range []string{"host", "host ssh-ed25519", "host ssh-ed25519 AAAA!", "@nonsense host ssh-ed25519 AAAA", "|1|x|y ssh-rsa AAAA"} {
		proxytest.WriteFile(t, s.KnownHosts, good+"\n"+bad+"\n")
		l, _ := newLink(t, s)
		if err := echoes(t, l); err == nil || !strings.Contains(err.Error(), s.KnownHosts+":3: ") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestHostCertificates(t *testing.T) {
	proxytest.NoLeaks(t)
	ca := filepath.Join(t.TempDir(), "ca")
	proxytest.Keygen(t, ca)
	cert := filepath.Join(t.TempDir(), "hostkey")
	proxytest.Keygen(t, cert)
	sign := func(args ...string) {
		if out, err := exec.Command("ssh-keygen", append([]string{"-q", "-s", ca, "-h", "-I", "test"}, append(args, cert+".pub")...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	sign("-n", "127.0.0.1")
	s := proxytest.StartSSHD(t, "HostKey "+cert, "HostCertificate "+cert+"-cert.pub")
	authority := strings.Fields(read(t, ca+".pub"))

	proxytest.WriteFile(t, s.KnownHosts, "@cert-authority 127.0.0.* "+authority[0]+" "+authority[1]+"\n")
	l, _ := newLink(t, s)
	if err := echoes(t, l); err != nil {
		t.Error("a certificate of a known authority:", err)
	}
	proxytest.WriteFile(t, s.KnownHosts, "@cert-authority other.example "+authority[0]+" "+authority[1]+"\n")
	l, _ = newLink(t, s)
	refusesKey(t, l, "not known")

	proxytest.WriteFile(t, s.KnownHosts, "@cert-authority 127.0.0.* "+authority[0]+" "+authority[1]+"\n"+
		"@revoked * "+authority[0]+" "+authority[1]+"\n")
	l, _ = newLink(t, s)
	refusesKey(t, l, "certificate")

	sign("-n", "elsewhere.example")
	s.Kill()
	s.Run()
	proxytest.WriteFile(t, s.KnownHosts, "@cert-authority 127.0.0.* "+authority[0]+" "+authority[1]+"\n")
	l, _ = newLink(t, s)
	refusesKey(t, l, "certificate")
}

func TestHostKeyTypes(t *testing.T) {
	proxytest.NoLeaks(t)
	dir := t.TempDir()
	types := map[string][]string{"rsa": {"-t", "rsa", "-b", "2048"}, "ecdsa": {"-t", "ecdsa", "-b", "384"}, "ed25519": {"-t", "ed25519"}}
	var lines []string
	for name, args := range types {
		file := filepath.Join(dir, name)
		proxytest.Keygen(t, file, args...)
		lines = append(lines, "HostKey "+file)
	}
	s := proxytest.StartSSHD(t, lines...)
	for name := range types { // the server has all; the one that is known is asked for
		os.Remove(s.KnownHosts)
		s.Know(filepath.Join(dir, name))
		l, _ := newLink(t, s)
		if err := echoes(t, l); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	s = proxytest.StartSSHD(t, "KexAlgorithms diffie-hellman-group14-sha256", "Ciphers aes128-ctr", "MACs hmac-sha2-256",
		"HostKeyAlgorithms rsa-sha2-256", "HostKey "+filepath.Join(dir, "rsa"))
	os.Remove(s.KnownHosts)
	s.Know(filepath.Join(dir, "rsa"))
	l, _ := newLink(t, s)
	if err := echoes(t, l); err != nil {
		t.Error("old algorithms:", err)
	}
}
