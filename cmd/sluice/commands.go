package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

const defaultListen = "1080"

func (p *program) rootCommand() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:   "sluice",
		Short: "Relay TCP: forward ports, serve SOCKS5 and HTTP proxies, chain them",
		Long: `sluice relays TCP so that neither end can tell it from a direct connection:
every byte, every end, every reset and every refusal arrives as what it was.

Without a command it is a SOCKS5 and HTTP proxy on 127.0.0.1:1080.`,
		Example: `  sluice                                   a proxy for this machine
  sluice proxy 1080 --via socks5://10.0.0.9:1080   the same, through another
  sluice forward 8080 example.com:80       forward a port
  sluice run sluice.yaml                   all that a file says`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := ""
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				hint = " (did you mean " + strings.Join(near, " or ") + "?)"
			}
			return usagef("unknown command %q%s", args[0], hint)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.oneInbound(cmd, &o, o.proxyType(), defaultListen, "")
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{inWords(err)} })
	root.SuggestionsMinimumDistance = 2
	o.addProxy(root.Flags())
	o.addShared(root.Flags())
	root.AddCommand(p.proxyCommand(), p.forwardCommand(), p.reverseCommand(), p.execCommand(), p.insideCommand(),
		p.redirectCommand(), p.tproxyCommand(), p.tunCommand(), p.runCommand(), p.checkCommand(),
		p.conformCommand(), p.labCommand(), p.versionCommand())
	return root
}

func (p *program) proxyCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "proxy [LISTEN]",
		Short: "Serve a SOCKS5 and HTTP proxy",
		Long: `Serve SOCKS5 and HTTP (CONNECT and plain) on one port.

LISTEN is a port on this machine's loopback (8080, the default is 1080), host:port,
:port for all addresses, or unix:///path. On an address that others can reach,
the proxy needs --users-file, or --open for none.`,
		Example: `  sluice proxy
  sluice proxy 10.0.0.1:1080 --users-file users.txt
  sluice proxy 1080 --via socks5://bob@10.0.0.9:1080?password-file=bob.pass
  sluice proxy 1080 --via https://proxy.example.com:443 --via socks5://10.0.0.9:1080`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("proxy: %q is one argument too many: one LISTEN at most", args[1])
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			listen := defaultListen
			if len(args) > 0 {
				listen = args[0]
			}
			return p.oneInbound(cmd, &o, o.proxyType(), listen, "")
		},
	}
	o.addProxy(cmd.Flags())
	o.addShared(cmd.Flags())
	return cmd
}

func (p *program) forwardCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "forward LISTEN DST",
		Short: "Forward a port",
		Long: `Forward every connection to LISTEN on to DST.

LISTEN is a port on this machine's loopback (8080), host:port, :port for all
addresses, or unix:///path. DST is host:port, a port on this machine, or unix:///path.
With udp:// before LISTEN, datagrams are forwarded.
Names are resolved for each connection, by the last proxy on the way if there is one.`,
		Example: `  sluice forward 8080 example.com:80
  sluice forward :5432 unix:///run/postgresql/.s.PGSQL.5432
  sluice forward 5432 db.internal:5432 --via ssh://bastion
  sluice forward :443 10.0.0.7:443 --send-proxy v2
  sluice forward udp://5353 192.0.2.1:53`,
		Args:              wantArgs(2, "needs LISTEN and DST (as in sluice forward 8080 example.com:80)"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.oneInbound(cmd, &o, "forward", args[0], args[1])
		},
	}
	o.addForward(cmd.Flags())
	o.addShared(cmd.Flags())
	return cmd
}

func (p *program) reverseCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "reverse LISTEN DST --via ssh://HOST",
		Short: "Forward a port of an SSH server to this side",
		Long: `Listen at LISTEN on an SSH server, the last hop of --via, and forward every
connection there to DST, as seen from here.

LISTEN is a port on the server's loopback (9000), host:port, :port for all its
addresses if it allows that (GatewayPorts), or unix:///path. For port 0 the server
chooses one, which is reported. DST is host:port, a port on this machine, or unix:///path.`,
		Example: `  sluice reverse 9000 localhost:3000 --via ssh://bastion
  sluice reverse unix:///run/app.sock 3000 --via ssh://bob@bastion:2222`,
		Args:              wantArgs(2, "needs LISTEN and DST (as in sluice reverse 9000 localhost:3000 --via ssh://bastion)"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.oneInbound(cmd, &o, "reverse", args[0], args[1])
		},
	}
	o.addShared(cmd.Flags())
	return cmd
}

func (p *program) runCommand() *cobra.Command {
	var log config.Log
	cmd := &cobra.Command{
		Use:               "run FILE",
		Short:             "Run what a configuration file says",
		Long:              "Run what a configuration file says; - is standard input.",
		Example:           "  sluice forward 8080 example.com:80 --print-config >sluice.yaml\n  sluice run sluice.yaml",
		Args:              wantArgs(1, "needs the configuration FILE (or - for standard input)"),
		ValidArgsFunction: yamlFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := p.load(args[0])
			if err != nil {
				return err
			}
			c.Log.Level = cmp.Or(log.Level, c.Log.Level)
			c.Log.Format = cmp.Or(log.Format, c.Log.Format)
			return p.serve(cmd.Context(), c, nil)
		},
	}
	addLog(cmd.Flags(), &log, " (whatever the file says)")
	return cmd
}

func (p *program) checkCommand() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check a configuration file",
		Long: `Say all that is wrong with a configuration file, and with the files and variables
that hold its secrets and lists. Nothing is bound or dialled.

With --route, say which rule and which way out a client that asks for that
destination would get, at each inbound. Rules that ask for the client's process
are passed over.`,
		Example: `  sluice check sluice.yaml
  sluice check sluice.yaml --route db.corp.example:5432
  sluice check sluice.yaml --route udp://10.0.0.1:53 --inbound web --from 192.168.7.3`,
		Args:              wantArgs(1, "needs the configuration FILE (or - for standard input)"),
		ValidArgsFunction: yamlFiles,
		RunE: func(_ *cobra.Command, args []string) error {
			return p.check(args[0], &q)
		},
	}
	cmd.Flags().StringVar(&q.dst, "route", "", "the destination to find the way to: `HOST:PORT` or udp://HOST:PORT")
	cmd.Flags().StringVar(&q.inbound, "inbound", "", "with --route: at the inbound called `NAME` only")
	cmd.Flags().StringVar(&q.user, "user", "", "with --route: for a client that has proved to be `NAME`")
	cmd.Flags().StringVar(&q.from, "from", "", "with --route: for a client at `IP`")
	return cmd
}

// question is what check is asked for about a flow.
type question struct{ dst, inbound, user, from string }

func (q *question) flow() (f proxy.Flow, err error) {
	f.User = q.user
	if q.from != "" {
		ip, err := netip.ParseAddr(q.from)
		if err != nil {
			return f, usagef("check: --from: %q is not an IP address", q.from)
		}
		f.Client = netip.AddrPortFrom(ip, 0)
	}
	switch f.Dst, err = proxy.ParseDst(q.dst); {
	case err != nil:
		return f, usagef("check: --route: %s", strings.TrimPrefix(err.Error(), "proxy: "))
	case q.dst == "" || f.Dst.Network == "unix":
		return f, usagef("check: --route: give the destination as host:port")
	}
	return f, nil
}

// check is the check command. It asks nothing where there is no question.
func (p *program) check(file string, q *question) error {
	var f proxy.Flow
	asked := *q != question{}
	if asked {
		var err error
		if f, err = q.flow(); err != nil {
			return err
		}
	}
	c, err := p.load(file)
	if err != nil {
		return err
	}
	bounds, err := c.Build(nil, p.lookupEnv)
	if err != nil {
		return err
	}
	if file == "-" {
		file = stdin
	}
	if !asked {
		rules := ""
		if n := len(c.Rules); n > 0 {
			rules = ", " + count(n, "rule")
		}
		fmt.Fprintf(p.stdout, "%s: good: %s, %s%s\n", file,
			count(len(c.Inbounds), "inbound"), count(len(c.Outbounds), "outbound"), rules)
		return nil
	}
	found := false
	for i := range bounds {
		if b := &bounds[i]; q.inbound == "" || q.inbound == b.Name {
			found = true
			fmt.Fprintln(p.stdout, c.Explain(b, f))
		}
	}
	if !found {
		return fmt.Errorf("%s: no inbound is called %s", file, q.inbound)
	}
	return nil
}

func yamlFiles(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
}

// inWords returns err, of a flag, without what Go calls a number that is none.
func inWords(err error) error {
	value, ok := errors.AsType[*pflag.InvalidValueError](err)
	if _, number := errors.AsType[*strconv.NumError](err); !ok || !number {
		return err
	}
	return fmt.Errorf("invalid argument %q for %q flag: it is not a whole number", value.GetValue(), "--"+value.GetFlag().Name)
}

// stdin is what standard input is called where it stands for a file.
const stdin = "stdin"

// load reads the configuration file called name, or standard input for "-".
func (p *program) load(name string) (*config.Config, error) {
	if name != "-" {
		return config.ReadFile(name)
	}
	data, err := io.ReadAll(p.stdin)
	if err != nil {
		return nil, fmt.Errorf("standard input: %w", err)
	}
	return config.Load(stdin, data)
}

// oneInbound runs, or prints, the configuration with the one inbound that a command line describes.
func (p *program) oneInbound(cmd *cobra.Command, o *options, typ, listen, to string) error {
	c, err := o.config(typ, listen, to)
	if err != nil {
		return &usageError{err}
	}
	if o.printConfig {
		return c.Print(p.stdout)
	}
	return p.serve(cmd.Context(), c, p.announce)
}

// count returns "1 session", "2 sessions".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
