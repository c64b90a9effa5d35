package sshlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// AuthError is a server that does not let us in. It equals EACCES.
type AuthError struct {
	User    string
	Tried   []string // what we have offered, and what became of it
	Allowed []string // the methods that the server would still take
	server  string   // its own words, if it has broken off
}

// Error lists what was tried.
func (e *AuthError) Error() string {
	tried := "nothing to try"
	if len(e.Tried) > 0 {
		tried = "tried " + strings.Join(e.Tried, ", ")
	}
	text := fmt.Sprintf("the server does not let user %s in: %s", e.User, tried)
	if len(e.Allowed) > 0 {
		text += "; it takes " + strings.Join(e.Allowed, ", ")
	}
	if e.server != "" {
		text += "; it says: " + e.server
	}
	return text
}

// Is says that e is a refusal.
func (e *AuthError) Is(target error) bool { return target == syscall.EACCES }

func (*AuthError) final() {}

// tries is how often a passphrase or password is asked for.
const tries = 3

// auth logs in: it chooses the methods of one handshake, one after the other, as ssh(1) does.
type auth struct {
	set      *Settings
	ask      asker
	password func() (string, error)
	secrets  *secrets
	log      *slog.Logger
	server   string // its name

	agentConn net.Conn
	stopAgent func() bool
	keys      []*candidate // nil until they were collected
	collected bool
	offered   bool // the keys, since the last one turned out to be of no use
	asked     int  // how often a password was asked for
	given     bool // the password from a file was shown, or the one remembered
	tried     []string
	allowed   []string
	began     bool
}

// candidate is a key that may let us in.
type candidate struct {
	signer ssh.Signer
	name   string // for people: the file, or the agent's comment
	path   string // empty for keys of the agent
}

// next is an [ssh.ClientAuthCallback].
func (a *auth) next(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
	a.began = true
	a.allowed = c.AllowedMethods
	if slices.Contains(c.AllowedMethods, "publickey") && !a.offered {
		a.offered = true
		a.collect()
		if len(a.keys) > 0 {
			return ssh.PublicKeysCallback(a.signers), nil
		}
		if len(a.tried) == 0 {
			a.tried = append(a.tried, "no key (there is none)")
		}
	}
	interactive := slices.Contains(c.AllowedMethods, "keyboard-interactive")
	if password := slices.Contains(c.AllowedMethods, "password"); !password && !interactive {
		return nil, a.over("")
	} else if a.password != nil {
		if a.given {
			return nil, a.over("")
		}
		a.given = true
		a.tried = append(a.tried, "the password given")
		if password {
			return ssh.PasswordCallback(a.password), nil
		}
		return ssh.KeyboardInteractive(a.answer), nil
	}
	if a.ask.prompt == nil {
		a.tried = append(a.tried, "no password ("+errNobody.Error()+")")
		return nil, a.over("")
	}
	if a.asked >= tries {
		return nil, a.over("")
	}
	if a.asked++; a.asked == 1 {
		a.tried = append(a.tried, "passwords typed in")
	}
	if interactive {
		return ssh.KeyboardInteractive(a.answer), nil
	}
	return ssh.PasswordCallback(a.askPassword), nil
}

// over is the end: no method is left. What was typed in was wrong.
func (a *auth) over(server string) error {
	a.secrets.setPassword("")
	return &AuthError{User: a.set.User, Tried: a.tried, Allowed: a.allowed, server: server}
}

// failure returns the error of a handshake that has failed with err, if it was logging in that failed.
func (a *auth) failure(err error) error {
	if !a.began {
		return nil
	}
	if e, ok := errors.AsType[*AuthError](err); ok {
		return e
	}
	if _, broken := errors.AsType[net.Error](err); broken || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return nil // the connection
	}
	return a.over(printable(strings.TrimPrefix(err.Error(), "ssh: handshake failed: ")))
}

func (a *auth) askPassword() (string, error) {
	if p := a.remembered(); p != "" {
		return p, nil
	}
	p, err := a.ask.ask(true, fmt.Sprintf("Password of %s at %s: ", a.set.User, a.server))
	if err == nil {
		a.secrets.setPassword(p)
	}
	return p, err
}

// remembered returns a password that was typed in for an earlier connection, once.
func (a *auth) remembered() string {
	if a.given {
		return ""
	}
	a.given = true
	return a.secrets.lastPassword()
}

// answer is an [ssh.KeyboardInteractiveChallenge]. The one hidden question that most servers ask is
// for the password. Questions are the server's words, and are shown as such.
func (a *auth) answer(name, instruction string, questions []string, echos []bool) ([]string, error) {
	var answers []string
	one := len(questions) == 1 && !echos[0]
	for i, q := range questions {
		if one && a.password != nil {
			p, err := a.password()
			if err != nil {
				return nil, err
			}
			return []string{p}, nil
		}
		if one {
			if p := a.remembered(); p != "" {
				return []string{p}, nil
			}
		}
		if a.password != nil {
			return nil, errors.New("the server asks more than a password")
		}
		var text strings.Builder
		for _, words := range []string{name, instruction} {
			if words != "" && i == 0 {
				text.WriteString(printable(words) + "\n")
			}
		}
		fmt.Fprintf(&text, "(%s at %s) %s", a.set.User, a.server, printable(q))
		s, err := a.ask.ask(!echos[i], text.String())
		if err != nil {
			return nil, err
		}
		if one {
			a.secrets.setPassword(s)
		}
		answers = append(answers, s)
	}
	return answers, nil
}

// banner shows what the server says before it lets anybody in.
func (a *auth) banner(message string) error {
	for line := range strings.Lines(message) {
		if line = strings.TrimSpace(printable(strings.TrimRight(line, "\r\n"))); line != "" {
			a.log.Debug("SSH: the server says", "server", a.server, "words", line)
		}
	}
	return nil
}

// collect finds the keys to offer: the agent's that are configured, the other ones of the agent, then
// files.
func (a *auth) collect() {
	if a.collected {
		a.keys = slices.DeleteFunc(a.keys, func(k *candidate) bool { return k.path != "" && a.secrets.isBad(k.path) })
		return
	}
	a.collected = true
	files := a.files()
	var fromAgent []*candidate
	for _, k := range a.agentKeys() {
		configured := slices.ContainsFunc(files, func(f *candidate) bool { return sameKey(f.signer, k.signer) })
		if configured || !a.set.IdentitiesOnly {
			fromAgent = append(fromAgent, k)
		}
	}
	files = slices.DeleteFunc(files, func(f *candidate) bool {
		return slices.ContainsFunc(fromAgent, func(k *candidate) bool { return sameKey(f.signer, k.signer) })
	})
	a.keys = append(fromAgent, files...)
}

func sameKey(a, b ssh.Signer) bool {
	return string(a.PublicKey().Marshal()) == string(b.PublicKey().Marshal())
}

// signers hands the keys over to be offered, and records that they were.
func (a *auth) signers() ([]ssh.Signer, error) {
	var all []ssh.Signer
	for _, k := range a.keys {
		all = append(all, &offeredKey{auth: a, key: k})
	}
	return all, nil
}

// offeredKey is a signer that records when it is looked at, which is when it is offered.
type offeredKey struct {
	auth *auth
	key  *candidate
	once bool
}

// PublicKey implements ssh.Signer.
func (o *offeredKey) PublicKey() ssh.PublicKey {
	if !o.once {
		o.once = true
		o.auth.tried = append(o.auth.tried, "key "+o.key.name)
	}
	return o.key.signer.PublicKey()
}

// Sign implements ssh.Signer.
func (o *offeredKey) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return o.SignWithAlgorithm(rand, data, "")
}

// SignWithAlgorithm implements ssh.AlgorithmSigner. A key that cannot sign is out of the game, but the
// others are to be offered again.
func (o *offeredKey) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	sig, err := signWith(o.key.signer, rand, data, algorithm)
	if err != nil {
		a := o.auth
		a.tried[len(a.tried)-1] += " (" + printable(err.Error()) + ")"
		a.keys = slices.DeleteFunc(a.keys, func(k *candidate) bool { return k == o.key })
		a.offered = len(a.keys) == 0
	}
	return sig, err
}

func signWith(s ssh.Signer, rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	if as, ok := s.(ssh.AlgorithmSigner); ok && algorithm != "" {
		return as.SignWithAlgorithm(rand, data, algorithm)
	}
	return s.Sign(rand, data)
}

// agentKeys asks the agent for its keys. No agent is no error.
func (a *auth) agentKeys() []*candidate {
	path := a.set.IdentityAgent
	if path == "" || path == "none" {
		return nil
	}
	conn, err := new(net.Dialer).DialContext(a.ask.ctx, "unix", path)
	if err != nil {
		a.tried = append(a.tried, fmt.Sprintf("no agent (%v)", err))
		return nil
	}
	a.agentConn = conn
	a.stopAgent = context.AfterFunc(a.ask.ctx, func() { conn.Close() })
	client := agent.NewClient(conn)
	signers, err := client.Signers()
	if err != nil {
		a.tried = append(a.tried, fmt.Sprintf("no agent (%s: %s)", path, printable(err.Error())))
		return nil
	}
	comments := make(map[string]string)
	if keys, err := client.List(); err == nil {
		for _, k := range keys {
			comments[string(k.Blob)] = k.Comment
		}
	}
	var all []*candidate
	for _, s := range signers {
		comment := printable(comments[string(s.PublicKey().Marshal())])
		all = append(all, &candidate{signer: s, name: strings.TrimSpace(comment + " of the agent")})
	}
	return all
}

// close ends what the handshake has opened.
func (a *auth) close() {
	if a.agentConn != nil {
		a.stopAgent()
		a.agentConn.Close()
	}
}

// files reads the key files, and the certificates beside them.
func (a *auth) files() []*candidate {
	var all []*candidate
	for _, path := range a.set.IdentityFiles {
		if a.secrets.isBad(path) {
			a.tried = append(a.tried, "not key "+path+" (its passphrase was wrong)")
			continue
		}
		k, err := a.file(path)
		if errors.Is(err, fs.ErrNotExist) && !a.set.explicit(path) {
			continue
		}
		if err != nil {
			a.tried = append(a.tried, fmt.Sprintf("not key %s (%v)", path, err))
			a.log.Warn("SSH: key not used", "file", path, "err", err)
			continue
		}
		for _, certPath := range append([]string{path + "-cert.pub"}, a.set.CertificateFiles...) {
			cert, err := readCertificate(certPath)
			if errors.Is(err, fs.ErrNotExist) && certPath == path+"-cert.pub" {
				continue
			}
			if err != nil {
				a.tried = append(a.tried, fmt.Sprintf("not certificate %s (%v)", certPath, err))
				continue
			}
			if signer, err := ssh.NewCertSigner(cert, k.signer); err == nil { // else it is another key's
				all = append(all, &candidate{signer: signer, name: certPath, path: path})
			}
		}
		all = append(all, k)
	}
	return all
}

func (a *auth) file(path string) (*candidate, error) {
	if k := a.secrets.key(path); k != nil {
		return &candidate{signer: k, name: path, path: path}, nil
	}
	data, mode, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" && mode.IsRegular() && mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("others can read it, mode %#o: run chmod 600 %s", mode.Perm(), path)
	}
	signer, err := ssh.ParsePrivateKey(data)
	missing, locked := errors.AsType[*ssh.PassphraseMissingError](err)
	switch {
	case err == nil:
		return &candidate{signer: signer, name: path, path: path}, nil
	case !locked:
		return nil, errors.New("not a private key that can be read")
	}
	public := missing.PublicKey
	if public == nil { // an old format, with its public half beside it
		pub, _, err := readFile(path + ".pub")
		if err == nil {
			public, _, _, _, err = ssh.ParseAuthorizedKey(pub)
		}
		if err != nil {
			return nil, fmt.Errorf("it has a passphrase, and %s.pub is not there to say which key it is", path)
		}
	}
	k := &lockedKey{auth: a, path: path, data: data, public: public}
	return &candidate{signer: k, name: path, path: path}, nil
}

// lockedKey is a key whose passphrase is asked for when the server has said that it wants the key.
type lockedKey struct {
	auth   *auth
	path   string
	data   []byte
	public ssh.PublicKey
}

// PublicKey implements ssh.Signer.
func (k *lockedKey) PublicKey() ssh.PublicKey { return k.public }

// Sign implements ssh.Signer.
func (k *lockedKey) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return k.SignWithAlgorithm(rand, data, "")
}

// SignWithAlgorithm implements ssh.AlgorithmSigner.
func (k *lockedKey) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	s, err := k.unlock()
	if err != nil {
		return nil, err
	}
	return signWith(s, rand, data, algorithm)
}

func (k *lockedKey) unlock() (ssh.Signer, error) {
	if s := k.auth.secrets.key(k.path); s != nil {
		return s, nil
	}
	for range tries {
		pass, err := k.auth.ask.ask(true, fmt.Sprintf("Passphrase of %s: ", k.path))
		if err != nil {
			return nil, fmt.Errorf("it has a passphrase, and %w", err)
		}
		if pass == "" {
			break
		}
		if s, err := ssh.ParsePrivateKeyWithPassphrase(k.data, []byte(pass)); err == nil {
			k.auth.secrets.setKey(k.path, s)
			return s, nil
		}
	}
	k.auth.secrets.setBad(k.path)
	return nil, errors.New("wrong passphrase")
}

func readCertificate(path string) (*ssh.Certificate, error) {
	data, _, err := readFile(path)
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		return nil, errors.New("not a certificate")
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("a public key and not a certificate")
	}
	return cert, nil
}

// maxFile bounds every file that is read.
const maxFile = 1 << 20

func readFile(path string) ([]byte, fs.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if fi.IsDir() {
		return nil, 0, errors.New("is a directory")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	return data, fi.Mode(), err
}
