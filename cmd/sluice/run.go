package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/enclosure"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2

	exitNotExecutable = 126 // of exec, as of env and nohup
	exitNotFound      = 127
)

// commandEnded says how the command of exec ended, with which exit code. There is nothing to be said of it.
type commandEnded int

func (c commandEnded) Error() string { return fmt.Sprintf("the command ended with code %d", int(c)) }

// program is one run of sluice: what it may use of the process.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	lookupEnv      func(string) (string, bool)
}

// usageError is a mistake in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// run runs the command that args (without the program's name) ask for and returns the exit code.
// Cancelling ctx ends it as a second signal would.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer,
	lookupEnv func(string) (string, bool)) int {
	p := &program{stdin: stdin, stdout: stdout, stderr: stderr, lookupEnv: lookupEnv}
	root := p.rootCommand()
	root.SetArgs(append([]string{}, args...)) // not nil, for which cobra would take os.Args
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if code, ok := errors.AsType[commandEnded](err); ok {
		return int(code)
	}
	for _, line := range strings.Split(complaints(err), "\n") {
		fmt.Fprintln(stderr, line)
	}
	if command, ok := errors.AsType[*enclosure.CommandError](err); ok {
		return commandCode(command)
	}
	if _, ok := errors.AsType[*usageError](err); !ok {
		return exitFailed
	}
	fmt.Fprintf(stderr, "Try: %s --help\n", cmd.CommandPath())
	return exitUsage
}

// complaints returns the text of err, one line for each of the errors that it joins. What is wrong in a
// file begins with its place, as compilers write it; all else with the program's name.
func complaints(err error) string {
	if joined, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err); ok {
		var lines []string
		for _, e := range joined.Unwrap() {
			lines = append(lines, complaints(e))
		}
		return strings.Join(lines, "\n")
	}
	e, ok := errors.AsType[*config.Error](err)
	switch {
	case ok && e.File != "":
		return e.Error()
	case ok:
		return fmt.Sprintf("sluice: %s: %v", flagOf(e.Path), e.Err)
	}
	text := err.Error()
	// The reader of a terminal has no packages.
	for _, pkg := range []string{"inbound: ", "config: ", "sshlink: ", "capture: ", "netstack: ", "enclosure: ", "tundev: "} {
		text = strings.TrimPrefix(text, pkg)
	}
	return "sluice: " + text
}

// flagOf names the argument or flag that fills the setting at path.
func flagOf(path string) string {
	path = strings.TrimPrefix(strings.TrimPrefix(path, "inbounds[0]."), "outbounds[0].")
	path, _, _ = strings.Cut(path, "[")
	switch path {
	case "listen":
		return "LISTEN"
	case "to":
		return "DST"
	}
	return "--" + strings.ReplaceAll(path, ".", "-")
}

// wantArgs lets a command run with n arguments only; words say which.
func wantArgs(n int, words string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < n:
			return usagef("%s: %s", cmd.Name(), words)
		case len(args) > n:
			return usagef("%s: %q is one argument too many: %s", cmd.Name(), args[n], words)
		}
		return nil
	}
}
