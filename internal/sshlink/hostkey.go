package sshlink

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/skeema/knownhosts"
	"golang.org/x/crypto/ssh"
	xknownhosts "golang.org/x/crypto/ssh/knownhosts"
)

// HostKeyError is a server that is not, or may not be, who it should be. Nothing has been sent to it
// that it could use. It equals EACCES.
type HostKeyError struct {
	Host  string
	Type  string   // of the key that the server has shown
	Shown string   // its fingerprint
	Known []string // the keys that were expected, each with its place; empty for an unknown host
	words string
}

// Error says what is wrong and what can be done.
func (e *HostKeyError) Error() string { return e.words }

// Is says that e is a refusal.
func (e *HostKeyError) Is(target error) bool { return target == syscall.EACCES }

func (*HostKeyError) final() {}

// hostKeys verifies the key of one server during one handshake.
type hostKeys struct {
	set        *Settings
	db         *knownhosts.HostKeyDB
	algorithms []string // in the order of preference: those of the keys that are known first
	ask        asker
	secrets    *secrets
	log        *slog.Logger
	err        error // of check
}

// hostKeys reads the files of known hosts. A line that cannot be read is an error: it may be the one
// that matters.
func (s *Settings) hostKeys(addr string, ask asker, log *slog.Logger) (*hostKeys, error) {
	var files []string
	for _, f := range slices.Concat(s.UserKnownHosts, s.GlobalKnownHosts) {
		if _, err := os.Stat(f); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		files = append(files, f)
	}
	db, err := knownhosts.NewDB(files...)
	if err != nil {
		return nil, &filesError{fmt.Errorf("known hosts: %s", strings.TrimPrefix(err.Error(), "knownhosts: "))}
	}
	h := &hostKeys{set: s, db: db, ask: ask, log: log}
	h.algorithms = db.HostKeyAlgorithms(addr)
	for _, a := range ssh.SupportedAlgorithms().HostKeys {
		if !strings.Contains(a, "-cert-") && !slices.Contains(h.algorithms, a) {
			h.algorithms = append(h.algorithms, a)
		}
	}
	return h, nil
}

// filesError is about files of the user, which do not mend themselves.
type filesError struct{ error }

func (*filesError) final()          {}
func (e *filesError) Unwrap() error { return e.error }

// check is an [ssh.HostKeyCallback].
func (h *hostKeys) check(addr string, remote net.Addr, key ssh.PublicKey) error {
	h.err = h.verify(addr, remote, key)
	return h.err
}

func (h *hostKeys) verify(addr string, remote net.Addr, key ssh.PublicKey) error {
	if _, ok := remote.(*net.TCPAddr); !ok {
		remote = &net.TCPAddr{IP: net.IPv4zero} // through a jump host; only addr counts
	}
	err := h.db.HostKeyCallback()(addr, remote, key)
	if err == nil {
		return nil
	}
	host := xknownhosts.Normalize(addr)
	e := &HostKeyError{Host: host, Type: key.Type(), Shown: ssh.FingerprintSHA256(key)}
	if revoked, ok := errors.AsType[*xknownhosts.RevokedError](err); ok {
		e.Known = []string{place(revoked.Revoked)}
		e.words = fmt.Sprintf("the host key of %s (%s) is revoked by %s", host, e.Shown, e.Known[0])
		return e
	}
	keyErr, ok := errors.AsType[*xknownhosts.KeyError](err)
	if !ok { // a certificate
		e.words = fmt.Sprintf("the host certificate of %s (%s) is refused: %s", host, e.Shown, printable(err.Error()))
		return e
	}
	for _, want := range keyErr.Want {
		if !h.isAuthority(addr, want.Key) {
			e.Known = append(e.Known, place(want))
		}
	}
	if len(e.Known) > 0 {
		e.words = fmt.Sprintf("THE HOST KEY OF %s HAS CHANGED: somebody may be listening in. It shows %s %s; known is %s. "+
			"If the change is known to be right, remove that line", host, e.Type, e.Shown, strings.Join(e.Known, " and "))
		return e
	}
	return h.unknown(e, addr, remote, key)
}

// isAuthority says whether key is that of an authority for addr, and not of the host itself.
func (h *hostKeys) isAuthority(addr string, key ssh.PublicKey) bool {
	for _, k := range h.db.HostKeys(addr) {
		if k.Cert && string(k.Marshal()) == string(key.Marshal()) {
			return true
		}
	}
	return false
}

// place describes a known key by its fingerprint and its line.
func place(k xknownhosts.KnownKey) string {
	return fmt.Sprintf("%s %s (%s:%d)", k.Key.Type(), ssh.FingerprintSHA256(k.Key), k.Filename, k.Line)
}

// unknown decides about a host that no file knows.
func (h *hostKeys) unknown(e *HostKeyError, addr string, remote net.Addr, key ssh.PublicKey) error {
	refused := func(why string) error {
		e.words = fmt.Sprintf("the host key of %s is not known (%s %s): %s", e.Host, e.Type, e.Shown, why)
		return e
	}
	switch h.set.StrictHostKeyChecking {
	case "yes":
		return refused("StrictHostKeyChecking is on")
	case "accept-new", "no", "off":
		return h.remember(addr, key)
	}
	if h.secrets.hasRefused(e.Shown) {
		return refused("it was not accepted")
	}
	question := fmt.Sprintf("The server %s is not known yet. Its key is\n    %s %s\nConnect, and remember the key? (yes/no) ",
		e.Host, e.Type, e.Shown)
	for range 3 {
		answer, err := h.ask.ask(false, question)
		if errors.Is(err, errNobody) {
			return refused("there is no terminal to ask at; run ssh " + h.set.sshArgs() + " once, or ssh-keyscan, and compare")
		}
		if err != nil {
			return refused(err.Error())
		}
		switch strings.ToLower(strings.TrimSpace(answer)) {
		case "y", "yes":
			return h.remember(addr, key)
		case "n", "no":
			h.secrets.refuse(e.Shown)
			return refused("it was not accepted")
		}
		question = "Please type yes or no: "
	}
	return refused("it was not accepted")
}

// remember adds the key to the user's first file of known hosts. Where that cannot be written, the key
// is accepted this time.
func (h *hostKeys) remember(addr string, key ssh.PublicKey) error {
	if len(h.set.UserKnownHosts) == 0 {
		return nil
	}
	name := h.set.UserKnownHosts[0]
	if err := h.append(name, addr, key); err != nil {
		h.log.Warn("SSH: the host key cannot be remembered", "file", name, "err", err)
	}
	return nil
}

func (h *hostKeys) append(name, addr string, key ssh.PublicKey) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	host := xknownhosts.Normalize(addr)
	if h.set.HashKnownHosts {
		host = xknownhosts.HashHostname(host)
	}
	line := strings.TrimSpace(host + " " + string(ssh.MarshalAuthorizedKey(key)))
	if fi, err := f.Stat(); err == nil && fi.Size() > 0 { // a last line without an end
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, fi.Size()-1); err == nil && last[0] != '\n' {
			line = "\n" + line
		}
	}
	_, err = f.WriteString(line + "\n")
	return err
}
