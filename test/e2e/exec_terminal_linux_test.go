package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// person sits at a terminal, in a shell.
type person struct {
	keys *os.File
	sees *output
}

// newPerson starts an interactive shell on a terminal of its own.
func newPerson(t *testing.T) *person {
	t.Helper()
	proxytest.Need(t, "bash")
	master, slave := openTerminal(t)
	shell := exec.Command("bash", "--norc", "--noediting", "-i")
	shell.Stdin, shell.Stdout, shell.Stderr = slave, slave, slave
	shell.Env = append(os.Environ(), "PS1=prompt: ", "GORACE=atexit_sleep_ms=0")
	shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	p := &person{master, new(output)}
	read := make(chan struct{})
	go p.look(read)
	t.Cleanup(func() {
		master.Close() // hangs up: all that is on the terminal gets SIGHUP
		<-read
		shell.Process.Kill()
		shell.Wait()
		if t.Failed() {
			t.Logf("on the terminal:\n%s", p.sees)
		}
	})
	return p
}

func (p *person) look(done chan<- struct{}) {
	defer close(done)
	b := make([]byte, 4096)
	for {
		n, err := p.keys.Read(b)
		p.sees.Write(b[:n])
		if err != nil {
			return
		}
	}
}

func (p *person) types(s string) { p.keys.WriteString(s) }

// waits waits until something stands on the terminal so many times.
func (p *person) waits(t *testing.T, what string, times int) {
	t.Helper()
	proxytest.Until(t, fmt.Sprintf("%q on the terminal, %d times", what, times), func() bool {
		return strings.Count(p.sees.String(), what) >= times
	})
}

// interrupts types Ctrl-C to a shell's job, and waits for the shell's prompt: what is typed before that is dropped.
func (p *person) interrupts(t *testing.T, prompt string) {
	t.Helper()
	n := strings.Count(p.sees.String(), prompt)
	p.types(ctrlC)
	p.waits(t, prompt, n+1)
}

const (
	ctrlC = "\x03"
	ctrlZ = "\x1a"
)

// TestExecTerminal: the terminal is the command's: its keys come to it once, and jobs are controlled as any.
func TestExecTerminal(t *testing.T) {
	t.Parallel()
	u := userOf(t, "", "")
	script := filepath.Join(openDir(t), "script")
	if err := os.WriteFile(script, []byte(`trap 'echo interr''upted; n=1$n' INT
echo run''ning; tty
while :; do sleep 0.1; case $n in 11) echo twi''ce; exit 3;; esac; done
`), 0o644); err != nil {
		t.Fatal(err)
	}
	p := newPerson(t)
	p.types(fmt.Sprintf("%s %s exec -- sh %s\n", u, binary, script))
	p.waits(t, "running", 1)
	p.waits(t, "/dev/pts/", 1)

	p.types(ctrlC)
	p.waits(t, "interrupted", 1)
	p.types(ctrlZ)
	p.waits(t, "Stopped", 1)
	p.types("echo at the shell: $((6 * 7))\n")
	p.waits(t, "at the shell: 42", 1)
	p.types("fg\n")
	p.waits(t, " exec -- sh ", 3) // echoed as typed, by the shell when it stopped, and now
	p.types(ctrlC)
	p.waits(t, "twice", 1)
	p.types("echo code $?.\n")
	p.waits(t, "code 3.", 1)
	if n := strings.Count(p.sees.String(), "interrupted"); n != 2 {
		t.Errorf("two keys have interrupted %d times", n)
	}
}

// TestExecShell: a shell in an enclosure takes the terminal for its jobs, and gives it back, also when it is suspended.
func TestExecShell(t *testing.T) {
	t.Parallel()
	u := userOf(t, "", "")
	p := newPerson(t)
	p.types(fmt.Sprintf("%s %s exec -- bash --norc --noediting -i\n", u, binary))
	p.types("PS1='inner: '; echo shell of $(id -u).\n")
	p.waits(t, "shell of "+somebody+".", 1)
	p.types("sh -c 'trap \"exit 130\" INT; echo run\"\"ning; while :; do sleep 0.1; done'\n")
	p.waits(t, "running", 1)
	p.interrupts(t, "inner: ")
	p.types("echo code $?.\n")
	p.waits(t, "code 130.", 1)
	p.types("suspend\n")
	p.waits(t, "Stopped", 1)
	p.types("echo user $(id -u).\n")
	p.waits(t, "user 0.", 1)
	p.types("fg\n")
	p.types("echo again $((1 + 1)).\n")
	p.waits(t, "again 2.", 1)
	p.types("exit 5\n")
	p.types("echo code $?.\n")
	p.waits(t, "code 5.", 1)
}
