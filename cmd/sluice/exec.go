package main

import (
	"errors"
	"io/fs"
	"os/exec"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/enclosure"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// defaultFlush is how long nothing may move of what a command that has ended has left.
const defaultFlush = config.Duration(2 * time.Second)

// execOptions are the flags of exec.
type execOptions struct {
	options
	sessions bool // are logged
}

func (p *program) execCommand() *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:   "exec [--via URL] [--] COMMAND [ARG...]",
		Short: "Run one program, with all its traffic through a proxy",
		Long: `Run COMMAND in a network of its own, where all TCP, UDP and DNS of it and its children,
whatever they are, goes out through sluice. It needs no rights, and no help from the program.

The exit code, signals, the terminal, files and the environment are the command's own.
Its names are resolved by the last proxy on the way, or here if there is none.`,
		Example: `  sluice exec --via socks5://127.0.0.1:1080 -- curl https://example.com/
  sluice exec --via ssh://bastion -- git clone https://git.internal/project.git
  sluice exec --via socks5://10.0.0.9:1080 -- bash`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("exec: needs a COMMAND " +
					"(as in sluice exec --via socks5://127.0.0.1:1080 -- curl https://example.com/)")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o.sessions = cmd.Flags().Changed("log-level")
			if cmd.Flags().Changed("mtu") && (o.in.MTU < tundev.MinMTU || o.in.MTU > tundev.PacketMax) {
				return usagef("--mtu: %d is not a number from %d to %d", o.in.MTU, tundev.MinMTU, tundev.PacketMax)
			}
			path, err := lookCommand(args[0])
			if err != nil {
				return err
			}
			return p.exec(cmd.Context(), &o, path, args)
		},
	}
	o.addExec(cmd.Flags())
	return cmd
}

// addExec adds the flags of exec. They end where the command begins.
func (o *execOptions) addExec(fs *pflag.FlagSet) {
	fs.SortFlags = false
	fs.SetInterspersed(false)
	o.addVia(fs)
	fs.Var(&textValue{&o.in.DNS}, "dns", "`how` names are resolved: fake (the last proxy does it), "+
		"the address of a resolver that is asked\n"+
		"through the proxy, fake,RESOLVER for what is not an address, or off (as outside)")
	fs.IntVar(&o.in.MTU, "mtu", 0, "`size` of the largest packet of the command's network (default 1500)")
	o.addRates(fs)
	o.addDirect(fs)
	o.addLimits(fs)
	durationFlag(fs, &o.cfg.Grace, "grace", defaultFlush,
		"when the command has ended, end once nothing of what it sent has moved for this `time`")
	o.cfg.Log = config.Log{Level: "warn", Format: "auto"}
	addLog(fs, &o.cfg.Log, "; without it, nothing of sessions")
}

// insideCommand is what exec starts in the command's network.
func (p *program) insideCommand() *cobra.Command {
	return &cobra.Command{
		Use:                enclosure.InsideName,
		Hidden:             true,
		DisableFlagParsing: true,
		RunE:               func(_ *cobra.Command, args []string) error { return enclosure.Inside(args) },
	}
}

// lookCommand finds a command as a shell does.
func lookCommand(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil || errors.Is(err, exec.ErrDot) {
		return path, nil
	}
	if e, ok := errors.AsType[*exec.Error](err); ok {
		err = e.Err
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	return "", &enclosure.CommandError{Name: name, Err: err}
}

// commandCode returns the exit code for a command that cannot be executed.
func commandCode(err *enclosure.CommandError) int {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return exitNotFound
	}
	return exitNotExecutable
}
