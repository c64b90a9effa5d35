package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/term"

	"github.com/sluice-proxy/sluice/internal/sshlink"
)

// terminal asks the person at the controlling terminal, wherever input and output of the process go.
type terminal struct{ mu sync.Mutex }

// openTerminal returns nil where there is no terminal.
func openTerminal() sshlink.Prompt {
	f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return new(terminal)
}

// Line implements sshlink.Prompt.
func (t *terminal) Line(ctx context.Context, question string) (string, error) {
	return t.ask(ctx, question, readLine, false)
}

// Secret implements sshlink.Prompt.
func (t *terminal) Secret(ctx context.Context, question string) (string, error) {
	return t.ask(ctx, question, readSecret, true)
}

type typed struct {
	text string
	err  error
}

// ask asks one question at a time. A read that is given up when ctx ends stays behind, and ends with
// the next line or with the process. What is typed once the question stands there is shown only if it is no secret.
func (t *terminal) ask(ctx context.Context, question string, read func(*os.File, chan<- typed), secret bool) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	state, err := term.GetState(int(f.Fd()))
	if err != nil {
		f.Close()
		return "", err
	}
	if secret {
		hideInput(int(f.Fd()))
	}
	if _, err := io.WriteString(f, question); err != nil {
		term.Restore(int(f.Fd()), state)
		f.Close()
		return "", err
	}
	answer := make(chan typed, 1)
	go read(f, answer)
	select {
	case a := <-answer:
		term.Restore(int(f.Fd()), state)
		f.Close()
		return a.text, a.err
	case <-ctx.Done():
		term.Restore(int(f.Fd()), state)
		io.WriteString(f, "\n")
		return "", context.Cause(ctx)
	}
}

func readSecret(f *os.File, answer chan<- typed) {
	b, err := term.ReadPassword(int(f.Fd()))
	io.WriteString(f, "\n")
	answer <- typed{string(b), err}
}

// readLine reads byte for byte, so as not to take what is typed for others.
func readLine(f *os.File, answer chan<- typed) {
	var line strings.Builder
	b := make([]byte, 1)
	for {
		n, err := f.Read(b)
		switch {
		case n == 1 && b[0] == '\n':
			answer <- typed{strings.TrimSuffix(line.String(), "\r"), nil}
			return
		case n == 1:
			line.WriteByte(b[0])
		case errors.Is(err, io.EOF) && line.Len() > 0:
			answer <- typed{line.String(), nil}
			return
		case err != nil:
			answer <- typed{"", err}
			return
		}
	}
}
