package tundev

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespaceDir is where ip netns keeps its namespaces.
const namespaceDir = "/run/netns"

// namespace is an open network namespace.
type namespace struct {
	name   string // empty: the one that the opener was in
	inode  uint64
	handle netns.NsHandle
}

// openNamespace opens the namespace called name, or, for none, that of the calling thread.
func openNamespace(name string) (*namespace, error) {
	own, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("tundev: network namespace: %w", err)
	}
	inode, err := inodeOf(own)
	if err != nil || name == "" {
		return &namespace{handle: own, inode: inode}, err
	}
	defer own.Close()
	if name != filepath.Base(name) || name == "." || name == ".." || strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("tundev: %q is not the name of a network namespace", name)
	}
	handle, err := netns.GetFromPath(filepath.Join(namespaceDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("tundev: there is no network namespace %s (make it by `ip netns add %s`): %w", name, name, err)
	} else if err != nil {
		return nil, fmt.Errorf("tundev: network namespace %s: %w", name, err)
	}
	n := &namespace{name: name, handle: handle}
	switch n.inode, err = inodeOf(handle); {
	case err != nil:
	case n.inode == inode:
		err = fmt.Errorf("tundev: network namespace %s is the one that this program runs in: "+
			"leave it out, and the program's own connections are told apart by a mark", name)
	default:
		err = n.do(func() error { return nil })
	}
	if err != nil {
		handle.Close()
		return nil, err
	}
	return n, nil
}

func inodeOf(h netns.NsHandle) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(h), &st); err != nil {
		return 0, fmt.Errorf("tundev: network namespace: %w", err)
	}
	return st.Ino, nil
}

// record is the name of its record: the same by whatever name, or none, the namespace was opened.
func (n *namespace) record() string { return fmt.Sprintf("tun-%d.json", n.inode) }

// close closes the handle. Sockets and devices keep the namespace alive.
func (n *namespace) close() { n.handle.Close() }

// do calls f in the namespace.
func (n *namespace) do(f func() error) error {
	if n.name == "" {
		return f()
	}
	done := make(chan error)
	go n.enter(f, done)
	return <-done
}

// enter calls f on a thread that is in the namespace meanwhile. A thread that cannot go back ends with the goroutine.
func (n *namespace) enter(f func() error, done chan<- error) {
	runtime.LockOSThread()
	back, err := netns.Get()
	if err != nil {
		done <- fmt.Errorf("tundev: network namespace: %w", err)
		return
	}
	defer back.Close()
	switch err := netns.Set(n.handle); {
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("tundev: %s is not a network namespace (any more)", filepath.Join(namespaceDir, n.name))
		fallthrough
	case err != nil:
		runtime.UnlockOSThread()
		done <- n.explain(err)
		return
	}
	err = f()
	if netns.Set(back) == nil {
		runtime.UnlockOSThread()
	}
	done <- err
}

func (n *namespace) explain(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("tundev: to enter network namespace %s needs CAP_SYS_ADMIN: run as root, "+
			"or run one command with all its traffic by `sluice exec`, which needs no rights: %w", n.name, err)
	}
	return fmt.Errorf("tundev: network namespace %s: %w", n.name, err)
}
