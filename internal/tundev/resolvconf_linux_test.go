package tundev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestNamespaceFile: a namespace gets a resolv.conf of its own only where the machine's would be of no use there, and nothing
// that was there or has come since is touched.
func TestNamespaceFile(t *testing.T) {
	l := newLab(t)
	for _, tt := range []struct {
		name, conf string
		before     string // in the namespace's own; empty: there is none
		during     string // what it holds meanwhile
		change     string // what somebody puts there meanwhile
		after      string
	}{
		{name: "a loopback name server", conf: "nameserver 127.0.0.53\noptions edns0\n",
			during: "# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.2\n"},
		{name: "none", conf: "# nameserver 192.0.2.1\n", during: "# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.2\n"},
		{name: "one that the namespace can ask", conf: "nameserver ::1\nnameserver 192.0.2.1\n"},
		{name: "one of its own", conf: "nameserver 127.0.0.53\n", before: "nameserver 192.0.2.2\n",
			during: "nameserver 192.0.2.2\n", after: "nameserver 192.0.2.2\n"},
		{name: "changed meanwhile", conf: "nameserver 127.0.0.53\n", during: "# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.2\n",
			change: "nameserver 192.0.2.3\n", after: "nameserver 192.0.2.3\n"},
	} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, crash %v", tt.name, crash), func(t *testing.T) {
				dir := t.TempDir()
				s := Setup{DNS: true, conf: filepath.Join(dir, "resolv.conf"), etc: filepath.Join(dir, "netns")}
				file := filepath.Join(s.etc, l.name, "resolv.conf")
				write := func(name, text string) {
					t.Helper()
					if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				holds := func(want string) {
					t.Helper()
					if b, err := os.ReadFile(file); string(b) != want || errors.Is(err, fs.ErrNotExist) != (want == "") {
						t.Errorf("%q (%v), want %q", b, err, want)
					}
				}
				write(s.conf, tt.conf)
				if tt.before != "" {
					if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
						t.Fatal(err)
					}
					write(file, tt.before)
				}
				link := l.up(s)
				holds(tt.during)
				if tt.change != "" {
					write(file, tt.change)
				}
				if crash {
					l.crash(link)
					if _, err := clean(l.name, l.dir); err != nil {
						t.Error(err)
					}
				} else {
					link.Device.Close()
					if err := link.Down(); err != nil {
						t.Error(err)
					}
				}
				holds(tt.after)
				if left, err := os.ReadDir(dir); err != nil || tt.after == "" && len(left) != 1 {
					t.Errorf("left: %v, %v", left, err)
				}
			})
		}
	}
}

// TestNamespaceFileAfterReboot: /etc outlives a power cut, and the record of what was made there does not.
func TestNamespaceFileAfterReboot(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	s := Setup{DNS: true, conf: filepath.Join(dir, "resolv.conf"), etc: filepath.Join(dir, "netns")}
	file := filepath.Join(s.etc, l.name, "resolv.conf")
	if err := errors.Join(os.WriteFile(s.conf, []byte("nameserver 127.0.0.53\n"), 0o644), os.MkdirAll(filepath.Dir(file), 0o755)); err != nil {
		t.Fatal(err)
	}
	for left, gone := range map[string]bool{
		"# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.6\n":           true,
		"# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.6\nsearch a\n": false,
		"# Made by sluice tun, and removed at its end.\nnameserver 192.0.2.1 # of mine\n":  false,
		"nameserver 198.18.0.6\n": false,
	} {
		if err := os.WriteFile(file, []byte(left), 0o644); err != nil {
			t.Fatal(err)
		}
		link := l.up(s)
		during, _ := os.ReadFile(file)
		link.Device.Close()
		if err := link.Down(); err != nil {
			t.Error(err)
		}
		after, _ := os.ReadFile(file)
		if want := left; gone {
			if want = "# Made by sluice tun, and removed at its end.\nnameserver 198.18.0.2\n"; string(during) != want || after != nil {
				t.Errorf("left %q: meanwhile %q, then %q", left, during, after)
			}
		} else if string(during) != left || string(after) != left {
			t.Errorf("%q became %q, and then %q", left, during, after)
		}
	}
}
