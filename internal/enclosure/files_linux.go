package enclosure

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// files are what the command sees in place of the system's, so that it asks the nameserver of its network for names,
// and nobody else. They are laid over the system's by mounts that only the command and its children see.
type files struct {
	content map[string][]byte // by path; they are mounted over the files there

	// hidden are directories with the sockets of services that resolve names, outside. In their place are directories
	// with these files.
	hidden map[string]map[string][]byte

	missing []byte // the resolv.conf of a system that has none
}

const scratch = "/tmp" // where the files are made, below a mount that is there for that moment only

// newFiles looks at the system's files.
func newFiles(nameserver netip.Addr) *files {
	f := &files{content: map[string][]byte{}, hidden: map[string]map[string][]byte{}}
	resolv := fmt.Appendf(nil, "# by sluice exec: names are resolved at the other end\nnameserver %v\nsearch .\n", nameserver)
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err == nil {
		f.content["/etc/resolv.conf"] = resolv
	} else {
		f.missing = resolv
	}
	if b, err := os.ReadFile("/etc/nsswitch.conf"); err == nil {
		if plain := plainHosts(b); !bytes.Equal(plain, b) {
			f.content["/etc/nsswitch.conf"] = plain
		}
	}
	for _, dir := range []string{"/run/nscd", "/var/run/nscd"} {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			f.hidden[real] = nil
		}
	}
	// systemd-resolved has its socket beside the files that resolv.conf is a link to.
	const resolved = "/run/systemd/resolve"
	if isDir(resolved) {
		f.hidden[resolved] = map[string][]byte{"resolv.conf": resolv, "stub-resolv.conf": resolv}
		if filepath.Dir(target) == resolved {
			f.hidden[resolved][filepath.Base(target)] = resolv
		}
	}
	return f
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// plainHosts returns nsswitch.conf(5) with names looked up in /etc/hosts and by DNS only. Other ways lead
// through services that are outside.
func plainHosts(conf []byte) []byte {
	var out []byte
	for line := range bytes.Lines(conf) {
		database, rest, ok := strings.Cut(string(line), ":")
		if !ok || strings.TrimSpace(database) != "hosts" {
			out = append(out, line...)
			continue
		}
		rest, _, _ = strings.Cut(rest, "#")
		words := strings.Fields(rest)
		plain := slices.DeleteFunc(slices.Clone(words), func(w string) bool {
			return !slices.Contains([]string{"files", "myhostname", "dns"}, w)
		})
		if !slices.Contains(plain, "dns") {
			plain = append(plain, "dns")
		}
		if slices.Equal(plain, words) {
			out = append(out, line...)
			continue
		}
		out = fmt.Appendf(out, "hosts: %s\n", strings.Join(plain, " "))
	}
	return out
}

// lay mounts them.
func (f *files) lay() error {
	// What is mounted outside later on, as a stick, is to be seen inside; nothing the other way round.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("mounts: %w (the root directory is no mount point, as after chroot: make DIR one before, by "+
			"`mount --bind DIR DIR`)", err)
	} else if err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	// All places are opened before anything is mounted that could hide them.
	places := map[string]*os.File{}
	defer closeFiles(places)
	for name := range f.content {
		if err := openPlace(places, name); err != nil {
			return err
		}
	}
	for name := range f.hidden {
		if err := openPlace(places, name); err != nil {
			return err
		}
	}
	if err := unix.Mount("sluice", scratch, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", scratch, err)
	}
	mask := unix.Umask(0o022)
	err := f.layFrom(scratch, places)
	unix.Umask(mask)
	if e := unix.Unmount(scratch, unix.MNT_DETACH); e != nil { // what is bound elsewhere stays
		err = errors.Join(err, fmt.Errorf("unmount %s: %w", scratch, e))
	}
	return err
}

// openPlace opens what is to be covered, behind symbolic links.
func openPlace(places map[string]*os.File, name string) error {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	places[name] = os.NewFile(uintptr(fd), name)
	return nil
}

func closeFiles(files map[string]*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// layFrom makes the files in dir and mounts them.
func (f *files) layFrom(dir string, places map[string]*os.File) error {
	bind := func(source, name string) error {
		err := unix.Mount(source, fmt.Sprintf("/proc/self/fd/%d", places[name].Fd()), "", unix.MS_BIND, "")
		if err != nil {
			return fmt.Errorf("mount over %s: %w", name, err)
		}
		return nil
	}
	for name, content := range f.content {
		source := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(source, content, 0o644); err != nil {
			return err
		}
		if err := bind(source, name); err != nil {
			return err
		}
	}
	n := 0
	for name, inside := range f.hidden {
		n++
		source := filepath.Join(dir, fmt.Sprint(n))
		if err := os.Mkdir(source, 0o755); err != nil {
			return err
		}
		for base, content := range inside {
			if err := os.WriteFile(filepath.Join(source, base), content, 0o644); err != nil {
				return err
			}
		}
		if err := bind(source, name); err != nil {
			return err
		}
	}
	if f.missing == nil {
		return nil
	}
	// Nothing is there that could be mounted over, and nobody but root may make it. So the whole directory is
	// merged with another one that has it.
	source := filepath.Join(dir, "etc")
	if err := os.Mkdir(source, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(source, "resolv.conf"), f.missing, 0o644); err != nil {
		return err
	}
	if err := unix.Mount("sluice", "/etc", "overlay", unix.MS_RDONLY, "lowerdir="+source+":/etc"); err != nil {
		return fmt.Errorf("/etc/resolv.conf is missing, or a link to nowhere, and cannot be laid over: %w", err)
	}
	return nil
}
