package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sluice-proxy/sluice/internal/lab"
)

func (p *program) labCommand() *cobra.Command {
	var html, only string
	var names []string
	for _, r := range lab.Relays() {
		names = append(names, r.Name)
	}
	cmd := &cobra.Command{
		Use:   "lab [NAME]",
		Short: "See why the relay of four lines is wrong: each known way, run",
		Long: `Play what happens to connections (ends, half-closes, resets, stalls) on the known ways to write
a relay, and on sluice's own, and print a table of who loses what. It takes about half a minute.

With NAME, show one of them: its code, what its users lose, and what happened, event by event.
The names: ` + strings.Join(names, ", ") + `.`,
		Example: `  sluice lab
  sluice lab close-both
  sluice lab half-close --only reset-
  sluice lab --html lab.html`,
		ValidArgs: names,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usagef("lab: %q is one argument too many: one NAME at most", args[1])
			case len(args) == 1 && lab.Find(args[0]) == nil:
				return usagef("lab: there is no relay %q: they are %s", args[0], strings.Join(names, ", "))
			case len(args) == 1 && html != "":
				return usagef("lab: --html writes all relays: leave out %s", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			relays := lab.Relays()
			if len(args) == 1 {
				relays = []*lab.Relay{lab.Find(args[0])}
			}
			return p.lab(cmd.Context(), relays, len(args) == 1, only, html)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().StringVar(&html, "html", "", "write a web page with the table and diagrams to this `file`")
	cmd.Flags().StringVar(&only, "only", "", "play the scenarios whose names contain this `word`")
	return cmd
}

func (p *program) lab(ctx context.Context, relays []*lab.Relay, one bool, only, html string) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	progress := func(played, all int) {}
	if f, ok := p.stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		progress = func(played, all int) {
			fmt.Fprintf(f, "\r%d of %d scenarios", played, all)
			if played == all {
				fmt.Fprint(f, "\r\033[K")
			}
		}
	}
	t := lab.Run(ctx, relays, only, progress)
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case len(t.Scenarios) == 0:
		return usagef("lab: --only: no scenario's name contains %q", only)
	case one:
		t.WriteRelay(p.stdout, relays[0])
		return nil
	case html == "":
		t.WriteText(p.stdout)
		fmt.Fprintln(p.stdout, "\nOne of them in detail: sluice lab NAME. All of it as a web page: sluice lab --html FILE.")
		return nil
	}
	f, err := os.Create(html)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.WriteHTML(f); err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "Wrote %s\n", html)
	return f.Close()
}
