//go:build unix

package sshlink

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// letIn checks that l is let in, or is not and says so with words.
func letIn(t *testing.T, l *Link, words ...string) {
	t.Helper()
	err := echoes(t, l)
	if len(words) == 0 {
		if err != nil {
			t.Error(err)
		}
		return
	}
	if _, ok := errors.AsType[*AuthError](err); !ok || !errors.Is(err, syscall.EACCES) {
		t.Errorf("want an AuthError, got %v", err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("no %q in: %v", w, err)
		}
	}
}

func TestKeyTypes(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	for name, args := range map[string][]string{
		"rsa": {"-t", "rsa", "-b", "2048"}, "ecdsa": {"-t", "ecdsa"}, "ed25519": {"-t", "ed25519"},
		"rsa in PEM": {"-t", "rsa", "-b", "2048", "-m", "PEM"},
	} {
		key := filepath.Join(s.Dir, name)
		proxytest.Keygen(t, key, args...)
		l, _ := newLink(t, s)
		l.Settings.IdentityFiles = []string{key}
		letIn(t, l, "tried", name, "it takes publickey")
		s.Authorize(key)
		l, _ = newLink(t, s)
		l.Settings.IdentityFiles = []string{key}
		letIn(t, l)
	}
}

func TestKeysThatCannotBeUsed(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	file := func(name, text string, mode os.FileMode) string {
		name = filepath.Join(s.Dir, name)
		proxytest.WriteFile(t, name, text)
		os.Chmod(name, mode)
		return name
	}
	key := read(t, s.UserKey)
	for path, words := range map[string]string{
		file("world", key, 0o644):                        "chmod 600",
		file("rubbish", "no key", 0o600):                 "not a private key",
		filepath.Join(s.Dir, "absent"):                   "no such file",
		s.Dir:                                            "is a directory",
		file("cut", key[:len(key)/2], 0o600):             "not a private key",
		file("public", read(t, s.UserKey+".pub"), 0o600): "not a private key",
	} {
		l, _ := newLink(t, s)
		l.Settings.IdentityFiles = []string{path}
		letIn(t, l, path, words)
		l, _ = newLink(t, s) // beside a good one it does no harm
		l.Settings.IdentityFiles = []string{path, s.UserKey}
		letIn(t, l)
	}
}

func TestPassphrase(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	for _, format := range []string{"RFC4716", "PEM"} {
		locked := filepath.Join(s.Dir, "locked"+format)
		proxytest.Keygen(t, locked, "-t", "rsa", "-b", "2048", "-a", "1", "-N", "correct horse", "-m", format)
		s.Authorize(locked)

		l, book := newLink(t, s)
		l.Settings.IdentityFiles = []string{locked}
		l.Settings.AliveInterval = 0
		person := &typist{rules: [][2]string{{locked, "battery"}, {locked, "staple"}, {locked, "correct horse"}}}
		l.Prompt = person
		letIn(t, l)
		if person.count() != 3 {
			t.Errorf("asked %q", person.asked)
		}
		s.Kill()
		s.Run()
		letIn(t, l) // it is not asked for again
		if person.count() != 3 {
			t.Errorf("asked %q", person.asked)
		}
		noSecrets(t, book, nil, "battery", "staple", "correct horse")

		l, book = newLink(t, s)
		l.Settings.IdentityFiles = []string{locked}
		person = &typist{rules: [][2]string{{locked, "battery staple"}}}
		l.Prompt = person
		err := echoes(t, l)
		if person.count() != 3 || err == nil || !strings.Contains(err.Error(), "wrong passphrase") {
			t.Errorf("asked %q, %v", person.asked, err)
		}
		noSecrets(t, book, err, "battery staple")

		l, _ = newLink(t, s)
		l.Settings.IdentityFiles = []string{locked, s.UserKey} // the next key is tried
		l.Prompt = &typist{rules: [][2]string{{locked, "battery staple"}}}
		letIn(t, l)

		l, _ = newLink(t, s)
		l.Settings.IdentityFiles = []string{locked}
		letIn(t, l, locked, "passphrase", "no terminal")
	}
	unauthorized := filepath.Join(s.Dir, "unauthorized")
	proxytest.Keygen(t, unauthorized, "-a", "1", "-N", "secret")
	l, _ := newLink(t, s)
	l.Settings.IdentityFiles = []string{unauthorized}
	person := &typist{}
	l.Prompt = person
	letIn(t, l, unauthorized)
	if n := person.count(); n != 0 {
		t.Errorf("the passphrase of a key that the server does not want was asked for: %q", person.asked)
	}
}

// noSecrets checks that no secret is in the log or the error.
func noSecrets(t *testing.T, book *logbook, err error, secrets ...string) {
	t.Helper()
	text := book.String()
	if err != nil {
		text += err.Error()
	}
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("the secret %q is in: %s", s, text)
		}
	}
}

// startAgent starts an ssh-agent and returns its socket.
func startAgent(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	proxytest.Start(t, path, "ssh-agent", "-D", "-a", path)
	return path
}

func addToAgent(t *testing.T, agent, key string) {
	t.Helper()
	cmd := exec.Command("ssh-add", "-q", key)
	cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+agent)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v: %s", err, out)
	}
}

func TestAgent(t *testing.T) {
	proxytest.NoLeaks(t)
	proxytest.Need(t, "ssh-agent", "ssh-add")
	s := proxytest.StartSSHD(t)
	agent := startAgent(t)
	other := filepath.Join(s.Dir, "other")
	proxytest.Keygen(t, other, "-t", "rsa", "-b", "2048")
	addToAgent(t, agent, other)

	l, _ := newLink(t, s)
	l.Settings.IdentityFiles, l.Settings.IdentityAgent = nil, agent
	letIn(t, l, "of the test of the agent")
	s.Authorize(other)
	letIn(t, l)

	l, _ = newLink(t, s)
	l.Settings.IdentityFiles, l.Settings.IdentityAgent, l.Settings.IdentitiesOnly = nil, agent, true
	letIn(t, l, "no key")

	// A key with a passphrase that the agent has is not asked for.
	locked := filepath.Join(s.Dir, "locked")
	proxytest.Keygen(t, locked)
	addToAgent(t, agent, locked)
	s.Authorize(locked)
	if out, err := exec.Command("ssh-keygen", "-q", "-p", "-P", "", "-a", "1", "-N", "secret", "-f", locked).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l, _ = newLink(t, s)
	l.Settings.IdentityFiles, l.Settings.IdentityAgent, l.Settings.IdentitiesOnly = []string{locked}, agent, true
	letIn(t, l)

	l, _ = newLink(t, s)
	l.Settings.IdentityFiles, l.Settings.IdentityAgent = nil, agent+".not"
	letIn(t, l, "no agent")
}

func TestUserCertificates(t *testing.T) {
	proxytest.NoLeaks(t)
	ca := filepath.Join(t.TempDir(), "ca")
	proxytest.Keygen(t, ca)
	s := proxytest.StartSSHD(t, "TrustedUserCAKeys "+ca+".pub")
	for name, args := range map[string][]string{"ed25519": {"-t", "ed25519"}, "rsa": {"-t", "rsa", "-b", "2048"}, "locked": {"-a", "1", "-N", "secret"}} {
		key := filepath.Join(s.Dir, name)
		proxytest.Keygen(t, key, args...)
		l, _ := newLink(t, s)
		l.Settings.IdentityFiles = []string{key}
		letIn(t, l, name)
		if out, err := exec.Command("ssh-keygen", "-q", "-s", ca, "-I", "test", "-n", "root", key+".pub").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		l, _ = newLink(t, s)
		l.Settings.IdentityFiles = []string{key}
		l.Prompt = &typist{rules: [][2]string{{key, "secret"}}}
		letIn(t, l)

		elsewhere := filepath.Join(s.Dir, name+".cert")
		if err := os.Rename(key+"-cert.pub", elsewhere); err != nil {
			t.Fatal(err)
		}
		l, _ = newLink(t, s)
		l.Settings.IdentityFiles, l.Settings.CertificateFiles = []string{key}, []string{elsewhere}
		l.Prompt = &typist{rules: [][2]string{{key, "secret"}}}
		letIn(t, l)
	}
}

// passwordServer is an SSH server that takes passwords: the real one would ask for those of the machine.
func passwordServer(t *testing.T, config *ssh.ServerConfig) *Link {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	config.AddHostKey(signer)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) { servePasswords(c, config) })
	known := filepath.Join(t.TempDir(), "known_hosts")
	proxytest.WriteFile(t, known, fmt.Sprintf("[127.0.0.1]:%d %s", origin.Addr.Port, ssh.MarshalAuthorizedKey(signer.PublicKey())))
	return &Link{Name: "ssh://test", Settings: Settings{HostName: origin.Addr.Host, Port: origin.Addr.Port, User: "bob",
		UserKnownHosts: []string{known}, ConnectTimeout: proxytest.Patience}}
}

// servePasswords serves one conn: it connects what it is asked to connect.
func servePasswords(c net.Conn, config *ssh.ServerConfig) {
	conn, chans, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	var all sync.WaitGroup
	all.Go(func() { ssh.DiscardRequests(requests) })
	for ch := range chans {
		var want direct
		ssh.Unmarshal(ch.ExtraData(), &want)
		to, err := net.Dial("tcp", net.JoinHostPort(want.Host, strconv.Itoa(int(want.Port))))
		if err != nil {
			ch.Reject(ssh.ConnectionFailed, err.Error())
			continue
		}
		stream, requests, err := ch.Accept()
		if err != nil {
			to.Close()
			continue
		}
		all.Go(func() { ssh.DiscardRequests(requests) })
		all.Go(func() { io.Copy(to, stream); to.(*net.TCPConn).CloseWrite() })
		all.Go(func() { io.Copy(stream, to); stream.Close(); to.Close() })
	}
	conn.Close()
	all.Wait()
}

func TestPasswords(t *testing.T) {
	proxytest.NoLeaks(t)
	const secret = "tr0ub4dor & 3"
	right := func(user, p string) (*ssh.Permissions, error) {
		if user == "bob" && p == secret {
			return nil, nil
		}
		return nil, errors.New("wrong")
	}
	plain := func() *ssh.ServerConfig {
		return &ssh.ServerConfig{PasswordCallback: func(c ssh.ConnMetadata, p []byte) (*ssh.Permissions, error) {
			return right(c.User(), string(p))
		}}
	}
	interactive := func() *ssh.ServerConfig {
		return &ssh.ServerConfig{KeyboardInteractiveCallback: func(c ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
			answers, err := ask("", "", []string{"Password: "}, []bool{false})
			if err != nil || len(answers) != 1 {
				return nil, errors.New("no answer")
			}
			return right(c.User(), answers[0])
		}}
	}
	twoFactors := func() *ssh.ServerConfig {
		return &ssh.ServerConfig{KeyboardInteractiveCallback: func(c ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
			answers, err := ask("Two \x1bfactors", "Be quick", []string{"Password: ", "Code: "}, []bool{false, true})
			if err != nil || len(answers) != 2 || answers[1] != "123456" {
				return nil, errors.New("no answer")
			}
			return right(c.User(), answers[0])
		}}
	}
	for name, config := range map[string]func() *ssh.ServerConfig{"password": plain, "interactive": interactive} {
		t.Run(name, func(t *testing.T) {
			book := new(logbook)
			link := func() *Link {
				l := passwordServer(t, config())
				l.Log = slog.New(slog.NewTextHandler(book, &slog.HandlerOptions{Level: slog.LevelDebug}))
				t.Cleanup(func() { l.Close() })
				return l
			}
			l := link()
			l.Password = func() (string, error) { return secret, nil }
			letIn(t, l)

			l = link()
			l.Password = func() (string, error) { return "wr0ng", nil }
			err := echoes(t, l)
			if err == nil || !strings.Contains(err.Error(), "the password given") {
				t.Error(err)
			}
			noSecrets(t, book, err, "wr0ng", secret)

			l = link()
			person := &typist{rules: [][2]string{{"assword", "wr0ng"}, {"assword", secret}}}
			l.Prompt = person
			letIn(t, l)
			if person.count() != 2 || !strings.Contains(person.asked[0], "bob") {
				t.Errorf("asked %q", person.asked)
			}
			l.mu.Lock()
			l.up.wire.Close()
			l.mu.Unlock()
			letIn(t, l) // it is not asked for again
			if person.count() != 2 {
				t.Errorf("asked %q", person.asked)
			}

			l = link()
			person = &typist{rules: [][2]string{{"assword", "wr0ng"}}}
			l.Prompt = person
			letIn(t, l, "passwords typed in")
			if person.count() != 3 {
				t.Errorf("asked %q", person.asked)
			}
			letIn(t, link(), "no terminal")
			noSecrets(t, book, nil, "wr0ng", secret)
		})
	}
	l := passwordServer(t, twoFactors())
	defer l.Close()
	person := &typist{rules: [][2]string{{"assword", secret}, {"Code", "123456"}}}
	l.Prompt = person
	letIn(t, l)
	if strings.Contains(strings.Join(person.asked, ""), "\x1b") {
		t.Errorf("asked %q", person.asked)
	}
}

// TestServerThatThrowsUsOut: a kept link must not come back at once, again and again.
func TestServerThatThrowsUsOut(t *testing.T) {
	proxytest.NoLeaks(t)
	l := passwordServer(t, &ssh.ServerConfig{NoClientAuth: true})
	var dials atomic.Int32
	l.Keep = true
	l.DialServer = func(ctx context.Context, host string, port uint16) (net.Conn, error) {
		dials.Add(1)
		c, err := dialTCP(ctx, host, port)
		if err == nil {
			time.AfterFunc(50*time.Millisecond, func() { c.(*net.TCPConn).CloseRead() })
		}
		return c, err
	}
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	l.Close()
	if n := dials.Load(); n < 2 || n > 5 {
		t.Errorf("%d connections in 1.5 s", n)
	}
}

// TestKeptLinkDoesNotNag: a person who cannot answer is asked for one connection, not for each.
func TestKeptLinkDoesNotNag(t *testing.T) {
	proxytest.NoLeaks(t)
	l := passwordServer(t, &ssh.ServerConfig{PasswordCallback: func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) {
		return nil, errors.New("wrong")
	}})
	l.Keep = true
	person := &typist{rules: [][2]string{{"", "guess"}}}
	l.Prompt = person
	var dials atomic.Int32
	l.DialServer = func(ctx context.Context, host string, port uint16) (net.Conn, error) {
		dials.Add(1)
		return dialTCP(ctx, host, port)
	}
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	proxytest.Until(t, "another attempt", func() bool { return dials.Load() >= 3 })
	if n := person.count(); n != 3 {
		t.Errorf("asked %d times", n)
	}
	letIn(t, l, "passwords typed in") // for a stream that waits
	if n := person.count(); n != 6 {
		t.Errorf("asked %d times", n)
	}
	l.Close()
}
