package tundev

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// Where name servers are said: for the machine, and in place of that for what ip netns exec starts in a namespace.
const (
	resolvConf    = "/etc/resolv.conf"
	namespacesEtc = "/etc/netns"
)

// madeFile is a file that a Setup makes, and removes unless somebody has changed it.
type madeFile struct {
	Path, Content string
	Dirs          []string `json:",omitempty"` // those that were made for it, outermost first
}

// loopbackOnly says whether resolv.conf has no name server but on loopback (or none, which means 127.0.0.1), and which.
func loopbackOnly(conf []byte) (first netip.Addr, only bool) {
	for line := range bytes.Lines(conf) {
		words := strings.Fields(string(line))
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(words[1])
		if err != nil {
			continue
		}
		if !a.IsLoopback() {
			return a, false
		}
		if !first.IsValid() {
			first = a
		}
	}
	if !first.IsValid() {
		first = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return first, true
}

func namespacePath(etc, namespace string) string { return filepath.Join(etc, namespace, "resolv.conf") }

func namespaceConf(server netip.Addr) string {
	return "# Made by sluice tun, and removed at its end.\nnameserver " + server.String() + "\n"
}

// leftFile returns the file that was made for a namespace by a process that is gone, with its record, as after a power cut: /etc
// outlives it. Nil: there is none, or somebody has changed it.
func leftFile(etc, namespace string) *madeFile {
	path := namespacePath(etc, namespace)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	server, _ := loopbackOnly(b)
	if string(b) != namespaceConf(server) {
		return nil
	}
	return &madeFile{Path: path, Content: string(b)}
}

// namespaceFile returns the resolv.conf to make for a namespace, where one is needed: the machine's name server
// listens on the machine's loopback, which is not the namespace's, and the namespace has no resolv.conf of its own.
func namespaceFile(etc, namespace string, server netip.Addr) *madeFile {
	f := &madeFile{Path: namespacePath(etc, namespace), Content: namespaceConf(server)}
	if _, err := os.Lstat(f.Path); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, dir := range []string{etc, filepath.Dir(f.Path)} {
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			f.Dirs = append(f.Dirs, dir)
		}
	}
	return f
}

func (f *madeFile) make() error {
	for _, dir := range f.Dirs {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("tundev: %w", err)
		}
	}
	file, err := os.OpenFile(f.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("tundev: %w", err)
	}
	_, err = file.WriteString(f.Content)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("tundev: %w", err)
	}
	return nil
}

// remove removes the file, and says whether it did. What was cut short by a crash is ours, too.
func (f *madeFile) remove() (bool, error) {
	b, err := os.ReadFile(f.Path)
	removed := false
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, fmt.Errorf("tundev: %w", err)
	case !strings.HasPrefix(f.Content, string(b)):
		return false, nil
	default:
		if err := os.Remove(f.Path); err != nil {
			return false, fmt.Errorf("tundev: %w", err)
		}
		removed = true
	}
	for i := len(f.Dirs) - 1; i >= 0; i-- {
		os.Remove(f.Dirs[i]) // unless somebody has put something there
	}
	return removed, nil
}
