package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sluice-proxy/sluice/internal/capture"
)

func (p *program) redirectCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "redirect LISTEN",
		Short: "Proxy TCP that the packet filter redirects here, without the programs' knowledge",
		Long: `Take the connections that a REDIRECT rule of the packet filter turns to LISTEN, and
send each on to where it was going. Programs need no settings. Linux, TCP.

With --setup the rules are set up (nftables) and removed at exit, also after a crash.
LISTEN is a port on this machine's loopback (12346), for the traffic of this machine, or
:port for that of others, which this machine forwards.`,
		Example: `  sluice redirect 12346 --setup --via socks5://10.0.0.9:1080
  sluice redirect :12346 --setup --from lan0 --via ssh://bastion
  sluice redirect 12346 --mark 7 --via socks5://10.0.0.9:1080   with rules of your own`,
		Args:              wantArgs(1, "needs LISTEN (as in sluice redirect 12346 --setup)"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.oneInbound(cmd, &o, "redirect", args[0], "")
		},
	}
	o.addCapture(cmd.Flags())
	o.addShared(cmd.Flags())
	return cmd
}

func (p *program) tproxyCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "tproxy LISTEN",
		Short: "Proxy TCP and UDP that the packet filter hands over, without the programs' knowledge",
		Long: `Take the connections and datagrams that a TPROXY rule of the packet filter hands to
LISTEN, and send each on to where it was going. Programs need no settings. Linux, with
CAP_NET_ADMIN.

With --setup the rules (nftables) and the routing are set up, and removed at exit. After a
crash the next start at the same port removes what is left, and so does sluice tproxy down.`,
		Example: `  sluice tproxy 12345 --setup --via socks5://10.0.0.9:1080
  sluice tproxy 12345 --setup --from local,lan0 --exclude 192.168.0.0/16 --via ssh://bastion
  sluice tproxy 12345 --setup --from lan0 --dns fake --via socks5://10.0.0.9:1080
  sluice tproxy 12345 --mark 7 --via socks5://10.0.0.9:1080   with rules of your own`,
		Args:              wantArgs(1, "needs LISTEN (as in sluice tproxy 12345 --setup)"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.oneInbound(cmd, &o, "tproxy", args[0], "")
		},
	}
	o.addCapture(cmd.Flags())
	o.addDNS(cmd.Flags(), ", or off (the default)")
	o.addShared(cmd.Flags())
	cmd.AddCommand(p.tproxyDownCommand())
	return cmd
}

func (p *program) tproxyDownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove the routing that a crash has left behind",
		Long: `Remove the routing rules and routes of tproxy --setup whose process is gone. What belongs to
one that runs is left alone. (The packet filter rules go with the process by themselves.)`,
		Args: wantArgs(0, "takes no arguments"),
		RunE: func(*cobra.Command, []string) error {
			removed, err := capture.Clean()
			for _, r := range removed {
				fmt.Fprintf(p.stdout, "Removed %s\n", r)
			}
			if err == nil && len(removed) == 0 {
				fmt.Fprintln(p.stdout, "There is nothing to remove")
			}
			return err
		},
	}
}
