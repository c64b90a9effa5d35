package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluice-proxy/sluice/internal/conform"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// conformOptions are the flags of conform.
type conformOptions struct {
	socks, http, json, markdown, quick bool
	origin, name, only                 string
	pids                               []int
	timeout                            time.Duration
}

func (p *program) conformCommand() *cobra.Command {
	var o conformOptions
	cmd := &cobra.Command{
		Use:   "conform ADDR",
		Short: "Test any relay: what it does to bytes, ends, resets and silence",
		Long: `Test the relay that listens at ADDR: a port forwarder, a SOCKS5 proxy (--socks5) or an
HTTP proxy (--connect), sluice or any other. sluice is the client and the origin, and looks at what
arrives on the other side. It takes about 40 s where all is well, and longer for a relay that hangs.

A plain forwarder must forward to the address at --origin, where sluice listens. A proxy is asked
for a free port on loopback, or, if it runs on another machine, for the address at --origin.

Exit codes: 0 all scenarios passed that a relay must pass, 1 some failed or there is no relay,
2 used wrongly. Scenarios that a relay only should pass are reported and do not count.`,
		Example: `  socat TCP-LISTEN:8080,fork,reuseaddr TCP:127.0.0.1:9000 &
  sluice conform 8080 --origin 9000
  sluice conform 127.0.0.1:1080 --socks5 --pid $(pidof microsocks)
  sluice conform 8080 --origin 9000 --name "HAProxy 2.6" --json >haproxy.json
  sluice conform --markdown haproxy.json nginx.json
  sluice conform 9000 --origin 9000        no relay at all, to see that it passes`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case o.markdown && len(args) == 0:
				return usagef("conform: --markdown needs the files of --json reports")
			case o.markdown:
				return nil
			case len(args) == 0:
				return usagef("conform: needs ADDR, where the relay listens (as in sluice conform 8080 --origin 9000)")
			case len(args) > 1:
				return usagef("conform: %q is one argument too many: needs ADDR", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.markdown {
				return p.conformTable(args)
			}
			return p.conform(cmd, args[0], &o)
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.BoolVar(&o.socks, "socks5", false, "the relay is a SOCKS5 proxy")
	fs.BoolVar(&o.http, "connect", false, "the relay is an HTTP proxy that knows CONNECT")
	fs.StringVar(&o.origin, "origin", "", "listen at this `address` for what the relay forwards")
	fs.IntSliceVar(&o.pids, "pid", nil, "the relay's process `number`, to look for leaks and idle work; repeat for more")
	fs.StringVar(&o.only, "only", "", "play the scenarios whose names contain this `word`")
	fs.BoolVar(&o.quick, "quick", false, "small sizes, about 10 s: finds no limits of seconds")
	fs.DurationVar(&o.timeout, "timeout", 0, "give a scenario this `time` to end (default 27s)")
	fs.StringVar(&o.name, "name", "", "the relay's `name` in the report")
	fs.BoolVar(&o.json, "json", false, "write the report as JSON, and progress to standard error")
	fs.BoolVar(&o.markdown, "markdown", false, "write a Markdown table of reports; the arguments are their files")
	return cmd
}

// target reads the command line.
func (o *conformOptions) target(addr string) (*conform.Target, error) {
	t := &conform.Target{Mode: conform.Forward, PIDs: o.pids}
	switch {
	case o.socks && o.http:
		return nil, usagef("conform: --socks5 and --connect contradict each other")
	case o.socks:
		t.Mode = conform.SOCKS5
	case o.http:
		t.Mode = conform.Connect
	case o.origin == "":
		return nil, usagef("conform: say by --origin where the relay at %s forwards to, or --socks5 or --connect if it is a proxy", addr)
	}
	var err error
	if t.Addr, err = proxy.ParseDst(addr); err != nil {
		return nil, usagef("conform: ADDR: %w", trimmed(err))
	}
	if o.origin != "" {
		if t.Origin, err = proxy.ParseListen(o.origin); err != nil {
			return nil, usagef("conform: --origin: %w", trimmed(err))
		}
	}
	if o.timeout < 0 {
		return nil, usagef("conform: --timeout: %v is negative", o.timeout)
	}
	for _, pid := range o.pids {
		if pid <= 0 {
			return nil, usagef("conform: --pid: %d is not the number of a process", pid)
		}
	}
	return t, nil
}

func (o *conformOptions) sizes() relaytest.Options {
	sizes := relaytest.Full()
	if o.quick {
		sizes = relaytest.Options{Rounds: 40}
	}
	sizes.Only, sizes.Timeout = o.only, o.timeout
	return sizes
}

func (p *program) conform(cmd *cobra.Command, addr string, o *conformOptions) error {
	t, err := o.target(addr)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	bed, err := t.Listen()
	if err != nil {
		return err
	}
	defer bed.Origin.Close()
	if err := t.Probe(ctx, bed); err != nil {
		return err
	}
	progress := p.stdout
	if o.json {
		progress = p.stderr
	}
	fmt.Fprintf(progress, "Testing %s\n", t.Describe(bed.Origin.Addr()))
	r := &conform.Report{
		Relay: cmp.Or(o.name, t.Addr.String()), Addr: t.Addr.String(), Mode: t.Mode, Quick: o.quick, Started: time.Now(),
	}
	r.Results = conform.Run(ctx, bed, o.sizes(), func(res conform.Result) { fmt.Fprintln(progress, res.Line()) })
	r.Seconds = time.Since(r.Started).Round(time.Millisecond).Seconds()
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case len(r.Results) == 0:
		return usagef("conform: --only: no scenario's name contains %q", o.only)
	}
	r.Summary(progress)
	if len(t.PIDs) == 0 && o.only == "" {
		fmt.Fprintln(progress, "With --pid the relay's processes are looked at, too: what they leave behind, and what they cost when idle.")
	}
	if o.json {
		if err := r.WriteJSON(p.stdout); err != nil {
			return err
		}
	}
	if n := r.Count("must", conform.Fail); n > 0 {
		return fmt.Errorf("%s that a relay must pass failed", count(n, "scenario"))
	}
	return nil
}

func (p *program) conformTable(files []string) error {
	var reports []*conform.Report
	for _, name := range files {
		r, err := conform.ReadReport(name)
		if err != nil {
			return err
		}
		reports = append(reports, r)
	}
	conform.Markdown(p.stdout, reports)
	return nil
}

// trimmed is an error without the name of the package, which says nothing to the reader of a terminal.
func trimmed(err error) error { return errors.New(strings.TrimPrefix(err.Error(), "proxy: ")) }
