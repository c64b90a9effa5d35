package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluice-proxy/sluice/internal/tundev"
)

func (p *program) tunCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "tun [--via URL]",
		Short: "Take in all traffic of this machine, or of a network namespace",
		Long: `Make a TUN device, and lead all traffic of this machine, or of one network namespace, into it:
TCP, UDP, DNS, of programs that know of no proxy, and what the machine forwards for others.

What stays as it is: connections that are there already, answers to those who connect to this
machine, networks that have a route of their own (the LAN), and what sluice itself connects to.
Routes, rules and addresses are as before at the end. After a crash, the next start or
sluice tun down sees to it. It needs root; sluice exec runs one program without.`,
		Example: `  sluice tun --via socks5://10.0.0.9:1080
  sluice tun --via ssh://bastion --include 10.20.0.0/16
  sluice tun --via socks5://10.0.0.9:1080 --netns lab`,
		Args: wantArgs(0, "takes flags only (as in sluice tun --via socks5://10.0.0.9:1080)"),
		RunE: func(cmd *cobra.Command, _ []string) error { return p.oneInbound(cmd, &o, "tun", "", "") },
	}
	o.addTUN(cmd.Flags())
	cmd.AddCommand(p.tunDownCommand())
	return cmd
}

// addTUN adds the flags of tun.
func (o *options) addTUN(fs *pflag.FlagSet) {
	fs.SortFlags = false
	o.addVia(fs)
	addNamespace(fs, &o.in.Netns)
	fs.Var((*networksValue)(&o.in.Include), "include", "take in what goes to this `network` only; repeat for more")
	fs.Var((*networksValue)(&o.in.Exclude), "exclude", "leave alone what goes to this `network`; repeat for more")
	o.addDNS(fs, ", or off")
	fs.IntVar(&o.in.MTU, "mtu", 0, "`size` of the device's largest packet (default 1500)")
	fs.Var((*wordValue)(&o.in.Name), "name", "`name` of the device (default "+tundev.DefaultName+")")
	o.addRates(fs)
	o.addDirect(fs)
	o.addLimits(fs)
	o.addRun(fs)
}

// addDNS adds the flag that says what becomes of DNS questions.
func (o *options) addDNS(fs *pflag.FlagSet, off string) {
	fs.Var(&textValue{&o.in.DNS}, "dns", "`how` names are resolved: fake (the last proxy does it), the address of a resolver that is asked\n"+
		"through the proxy, fake,RESOLVER for what is not an address"+off)
}

func addNamespace(fs *pflag.FlagSet, name *string) {
	fs.Var((*wordValue)(name), "netns", "network namespace (as of ip netns) with this `name`, in place of this machine's")
}

func (p *program) tunDownCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Remove what a killed sluice tun has left",
		Long: `Remove the rules and routes of a sluice tun that was killed, and nothing else. One that runs is left alone.
It is never urgent: the device is gone, and all traffic goes as before.`,
		Example: "  sluice tun down\n  sluice tun down --netns lab",
		Args:    wantArgs(0, "takes flags only (as in sluice tun down --netns lab)"),
		RunE: func(*cobra.Command, []string) error {
			c, err := tundev.Clean(namespace)
			if err != nil {
				return err
			}
			if !c.Any() {
				fmt.Fprintln(p.stdout, "Nothing was left.")
				return nil
			}
			line := fmt.Sprintf("Removed %s, %s", count(c.Rules, "rule"), count(c.Routes, "route"))
			if len(c.Files) > 0 {
				line += ", " + strings.Join(c.Files, ", ")
			}
			fmt.Fprintln(p.stdout, line+".")
			return nil
		},
	}
	addNamespace(cmd.Flags(), &namespace)
	return cmd
}
