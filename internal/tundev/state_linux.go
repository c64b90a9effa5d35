package tundev

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// record is what a Setup is about to make that does not go with its process. It is written before anything is made,
// so that whoever comes after a crash finds no less than there is.
type record struct {
	PID       int    // of the process, to tell whom a network is in use by
	Namespace string `json:",omitempty"`
	Device    string
	Rules     []rule
	Files     []madeFile `json:",omitempty"`
}

// state is the file with the record of a network, locked: nobody else sets the network up. The lock goes with the process.
type state struct {
	file *os.File
	path string
}

// defaultDir is where records are. It goes with the machine's memory, as what they record does.
func defaultDir() string {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Sprintf("/run/user/%d/sluice", uid)
	}
	return "/run/sluice"
}

// openState opens the record of the namespace n in dir, making an empty one. The error wraps ErrBusy where
// another process has it.
func openState(dir string, n *namespace) (*state, error) {
	if err := ownDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, n.record())
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("tundev: record of what is made: %w", err)
		}
		s := &state{f, path}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			defer f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("tundev: lock %s: %w", path, err)
			}
			return nil, s.busy()
		}
		if s.current() {
			return s, nil
		}
		f.Close() // its last owner has just removed it
	}
}

// busy says who has the network.
func (s *state) busy() error {
	r, _ := s.read()
	if r == nil {
		r = &record{}
	}
	where := "this network"
	if r.Namespace != "" {
		where = "network namespace " + r.Namespace
	}
	if r.PID == 0 {
		return fmt.Errorf("tundev: another sluice is just leading %s into a device: %w", where, ErrBusy)
	}
	return fmt.Errorf("tundev: another sluice (pid %d) leads %s into %s: end it first (kill %d): %w", r.PID, where, r.Device, r.PID, ErrBusy)
}

// current says whether the open file is still the one at path.
func (s *state) current() bool {
	a, errA := s.file.Stat()
	b, errB := os.Lstat(s.path)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// read returns the record, or nil where there is none: the file is empty, or its writer was killed while writing, which
// was before it made anything.
func (s *state) read() (*record, error) {
	b, err := io.ReadAll(io.NewSectionReader(s.file, 0, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("tundev: %w", err)
	}
	var r record
	if json.Unmarshal(b, &r) != nil {
		return nil, nil
	}
	return &r, nil
}

func (s *state) write(r *record) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err == nil {
		err = s.file.Truncate(0)
	}
	if err == nil {
		_, err = s.file.WriteAt(append(b, '\n'), 0)
	}
	if err != nil {
		return fmt.Errorf("tundev: record of what is made: %w", err)
	}
	return nil
}

// close ends the lock. The record goes where nothing is left of what it says, or it says nothing.
func (s *state) close(done bool) error {
	st, err := s.file.Stat()
	if done || err == nil && st.Size() == 0 {
		if err = os.Remove(s.path); errors.Is(err, fs.ErrNotExist) {
			err = nil // somebody has tidied up
		}
	}
	return errors.Join(err, s.file.Close())
}

// ownDir makes dir, and refuses one that others may write to: they could have us remove what is not ours.
func ownDir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("tundev: directory for a record of what is made: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("tundev: %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fmt.Errorf("tundev: %s must be a directory that only its owner, user %d, can write to", dir, os.Geteuid())
	}
	return nil
}
