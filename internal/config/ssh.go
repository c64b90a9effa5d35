package config

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sshlink"
)

// sshOut makes a link of what o and the files of ssh_config(5) say, and links for the jump hosts that
// those name, unless via is a way already.
func sshOut(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error) {
	return b.ssh(o, via, 0)
}

func (b *builder) ssh(o *Outbound, via proxy.Dialer, depth int) (proxy.Dialer, error) {
	env := sshlink.SystemEnv(b.secrets.lookupEnv)
	files := env.ConfigFiles()
	switch o.SSHConfig {
	case "":
	case "none":
		files = nil
	default:
		files = []string{b.sshPath(o.SSHConfig)}
		if _, err := os.Stat(files[0]); err != nil && !strings.HasPrefix(files[0], "~") {
			return nil, fmt.Errorf("ssh-config: %w", err)
		}
	}
	asked := sshlink.Asked{Host: o.Host.Name, Port: o.Host.Port, User: o.User,
		IdentityFile: b.sshPath(o.IdentityFile), KnownHosts: b.sshPath(o.KnownHosts)}
	settings, err := sshlink.ReadSettings(files, env, asked)
	if err != nil {
		return nil, err
	}
	if b.log != nil {
		for _, w := range settings.Warnings {
			b.log.Warn("SSH: "+w, "server", o.url())
		}
	}
	if _, direct := via.(*outbound.Direct); via == nil || direct {
		for _, jump := range settings.ProxyJump {
			if depth++; depth > maxHops {
				return nil, errors.New("ProxyJump: jump hosts go in a circle, or there are too many")
			}
			if via, err = b.jump(jump, o, via, depth); err != nil {
				return nil, fmt.Errorf("ProxyJump %s: %w", jump, err)
			}
		}
	}
	link := &sshlink.Link{Name: o.url(), Settings: settings, Prompt: b.c.prompt, Keep: o.Keep, Log: b.log}
	if o.PasswordFile != "" || o.PasswordEnv != "" {
		password, err := b.secret(o)
		if err != nil {
			return nil, err
		}
		link.Password = func() (string, error) { return password, nil }
	}
	if via == nil {
		via = &outbound.Direct{}
	}
	link.DialServer = func(ctx context.Context, host string, port uint16) (net.Conn, error) {
		return via.DialStream(ctx, proxy.TCP(host, port))
	}
	s := &outbound.SSH{Link: link}
	b.kept = append(b.kept, s)
	return s, nil
}

// jump returns the way through a host of ProxyJump. It has the user's known hosts and settings, and its own keys.
func (b *builder) jump(host string, o *Outbound, via proxy.Dialer, depth int) (proxy.Dialer, error) {
	a, err := sshlink.ParseHost(host)
	if err != nil {
		return nil, err
	}
	hop := &Outbound{Type: "ssh", Host: SSHHost{a.Host, a.Port}, User: a.User, KnownHosts: o.KnownHosts,
		SSHConfig: o.SSHConfig}
	return b.dialer(hop, via, func(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error) {
		return b.ssh(o, via, depth)
	})
}

// sshPath returns where the file is that the configuration calls name; ~ is left to be expanded.
func (b *builder) sshPath(name string) string {
	if name == "" || strings.HasPrefix(name, "~/") {
		return name
	}
	return b.secrets.path(name)
}
