package main

import (
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

// peer is a relay to be measured.
type peer struct {
	name    string
	about   string   // its settings, for the report
	needs   []string // programs that must be installed
	version []string // a command that prints its version
	// start starts it between listen and origin. It need not be ready yet. Files go into dir.
	// A nil start is no relay: the client talks to the origin.
	start func(k *kit, dir, listen, origin string) ([]*process, error)
	// many starts a process for each of the origins, all of them at the port of listen. Nil where it cannot.
	many func(k *kit, dir, listen string, origins []string) ([]*process, error)
	// lab says that it is measured in a lab, as a router. Then there is no start, but the arguments of sluice
	// for a client at a place; nil for no relay.
	lab  bool
	args func(from place, origin string) []string
	not  []string // kinds of load, of a lab's, that it does not take or that say nothing of it
}

// kit is what peers are started with.
type kit struct {
	self    string // this binary
	sluice  string // the sluice binary, or empty with why
	why     error
	threads int // 0: each program's own choice
	fds     int // the limit of open files a process

	processes  int    // of each relay in the test scale; 0: as few as can
	congestion string // congestion control of a lab, empty for the machine's
}

// allPeers returns every peer in the order of the report.
func allPeers(k *kit) []peer {
	threads := "threads: one a core"
	if k.threads > 0 {
		threads = fmt.Sprintf("threads: %d", k.threads)
	}
	return append([]peer{
		{name: "direct", about: "no relay"},
		{name: "haproxy", about: "mode tcp, option splice-auto, " + threads,
			needs: []string{"haproxy"}, version: []string{"haproxy", "-v"}, start: haproxyAuto.start,
			many: each(haproxyAuto.start)},
		{name: "haproxy-splice", about: "the same with option splice-request and splice-response",
			needs: []string{"haproxy"}, version: []string{"haproxy", "-v"}, start: haproxySplice.start},
		{name: "haproxy-1m", about: "the same with tune.pipesize 1048576, too",
			needs: []string{"haproxy"}, version: []string{"haproxy", "-v"}, start: haproxyMiB.start},
		{name: "nginx", about: "stream, " + strings.Replace(threads, "threads", "workers", 1),
			needs: []string{"nginx"}, version: []string{"nginx", "-v"}, start: nginx, many: nginxMany},
		{name: "socat", about: "TCP-LISTEN,fork", needs: []string{"socat"}, version: []string{"socat", "-V"},
			start: socat},
		{name: "openssh", about: "ssh -N -L and its sshd, both counted, default cipher",
			needs: []string{"ssh", "sshd", "ssh-keygen"}, version: []string{"ssh", "-V"}, start: openssh},
		{name: "sluice-ssh", about: "sluice forward --via ssh://, and its sshd, both counted",
			needs: []string{"sshd", "ssh-keygen"}, start: sluiceSSH},
		{name: "iocopy", about: "Go, two io.Copy with half-close (splice)", start: baseline("iocopy")},
		{name: "pooled", about: "Go, copy through pooled 32 KiB, no splice", start: baseline("pooled")},
		{name: "closeboth", about: "Go, copy through pooled 16 KiB, first end closes both", start: baseline("closeboth")},
		{name: "sluice-lib", about: "relay.Start behind net.Listener and net.Dial", start: baseline("relay"),
			many: each(baseline("relay"))},
		{name: "sluice", about: "sluice forward --log-level warn (none of the relays logs its sessions)", start: sluice,
			many: each(sluiceShared)},
	}, labPeers...)
}

// missing says why p cannot run here, or nil.
func (k *kit) missing(p peer) error {
	for _, name := range p.needs {
		if _, err := lookPath(name); err != nil {
			return err
		}
	}
	if isProgram(p.name) && k.sluice == "" {
		return k.why
	}
	if p.lab {
		return canLab()
	}
	return nil
}

func run1(name string, args ...string) ([]*process, error) {
	path, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	p, err := launch(nil, path, args...)
	if err != nil {
		return nil, err
	}
	return []*process{p}, nil
}

// command is a peer of the -exec flag: a program with {listen} and {origin} in its arguments.
func command(args []string) func(*kit, string, string, string) ([]*process, error) {
	return func(_ *kit, _, listen, origin string) ([]*process, error) {
		args := fill(args, listen, origin)
		return run1(args[0], args[1:]...)
	}
}

func baseline(kind string) func(*kit, string, string, string) ([]*process, error) {
	return func(k *kit, _, listen, origin string) ([]*process, error) {
		return run1(k.self, "-serve", kind, listen, origin)
	}
}

func sluice(k *kit, _, listen, origin string) ([]*process, error) {
	return run1(k.sluice, "forward", listen, origin, "--log-level", "warn")
}

func socat(_ *kit, _, listen, origin string) ([]*process, error) {
	host, port, _ := net.SplitHostPort(listen)
	return run1("socat", "TCP-LISTEN:"+port+",bind="+host+",fork,reuseaddr,backlog=1024", "TCP:"+origin)
}

// conf writes a configuration file made of a template and returns its path.
func conf(dir, name, text string, data any) (string, error) {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return path, template.Must(template.New(name).Parse(text)).Execute(f, data)
}

// haproxyConf leaves room for the pipes: HAProxy wants two descriptors for each of maxconn and maxpipes.
const haproxyConf = `global
	maxconn {{.MaxConn}}
	maxpipes {{.MaxPipes}}
{{- if .Threads}}
	nbthread {{.Threads}}
{{- end}}
{{- if .Variant.Pipe}}
	tune.pipesize {{.Variant.Pipe}}
{{- end}}
defaults
	mode tcp
{{- if .Variant.Splice}}
	option splice-request
	option splice-response
{{- else}}
	option splice-auto
{{- end}}
	timeout connect 5s
	timeout client 1h
	timeout server 1h
listen bench
	bind {{.Listen}}
	server origin {{.Origin}}
`

// haproxy is one way to set HAProxy up.
type haproxy struct {
	Splice bool // always, not only where it finds that a stream is fast: a fast reader keeps it from finding out
	Pipe   int  // bytes; 0 for its default
}

var (
	haproxyAuto   haproxy
	haproxySplice = haproxy{Splice: true}
	haproxyMiB    = haproxy{Splice: true, Pipe: 1 << 20}
)

func (h haproxy) start(k *kit, dir, listen, origin string) ([]*process, error) {
	pipes := k.fds / 100
	path, err := conf(dir, "haproxy.cfg", haproxyConf, map[string]any{
		"MaxConn": (k.fds-2*pipes-200)/2 - 10, "MaxPipes": pipes,
		"Threads": k.threads, "Variant": h, "Listen": listen, "Origin": origin,
	})
	if err != nil {
		return nil, err
	}
	return run1("haproxy", "-db", "-f", path)
}

const nginxConf = `{{if .Module}}load_module {{.Module}};
{{end}}daemon off;
pid {{.Dir}}/nginx.pid;
error_log {{.Dir}}/nginx.log error;
worker_processes {{if .Threads}}{{.Threads}}{{else}}auto{{end}};
worker_rlimit_nofile {{.FDs}};
events {
	worker_connections {{.Conns}};
}
stream {
{{- if .Many}}
	upstream origins {
{{- range .Many}}
		server {{.}};
{{- end}}
	}
{{- end}}
	proxy_connect_timeout 5s;
	proxy_timeout 1h;
	server {
		listen {{.Listen}}{{if .Many}} reuseport{{end}};
		proxy_pass {{if .Many}}origins{{else}}{{.Origin}}{{end}};
	}
}
`

func nginx(k *kit, dir, listen, origin string) ([]*process, error) {
	return nginxWith(k, dir, listen, origin, nil)
}

// nginxMany is one nginx with a worker for each origin, and a socket that listens for each worker.
func nginxMany(k *kit, dir, listen string, origins []string) ([]*process, error) {
	own := *k
	own.threads = len(origins)
	return nginxWith(&own, dir, listen, "", origins)
}

func nginxWith(k *kit, dir, listen, origin string, many []string) ([]*process, error) {
	module := "/usr/lib/nginx/modules/ngx_stream_module.so" // built in where there is none
	if _, err := os.Stat(module); err != nil {
		module = ""
	}
	path, err := conf(dir, "nginx.conf", nginxConf, map[string]any{
		"Module": module, "Dir": dir, "Threads": k.threads,
		"FDs": k.fds, "Conns": k.fds - 100, "Listen": listen, "Origin": origin, "Many": many,
	})
	if err != nil {
		return nil, err
	}
	return run1("nginx", "-p", dir, "-e", filepath.Join(dir, "nginx.log"), "-c", path)
}

// sshdConf goes without PAM, whose session limits would hold sshd to 1024 descriptors.
const sshdConf = `ListenAddress {{.Listen}}
HostKey {{.Dir}}/host
AuthorizedKeysFile {{.Dir}}/client.pub
PidFile {{.Dir}}/sshd.pid
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding local
UsePAM no
LogLevel ERROR
`

// openssh starts an sshd, and ssh as a client that forwards listen to origin through it.
func openssh(k *kit, dir, listen, origin string) ([]*process, error) {
	return throughSSH(dir, func(me, host, port, known string) ([]*process, error) {
		return run1("ssh", "-N", "-F", "none", "-L", listen+":"+origin, "-p", port,
			"-i", filepath.Join(dir, "client"), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
			"-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "StrictHostKeyChecking=yes",
			"-o", "UserKnownHostsFile="+known, "-o", "GlobalKnownHostsFile=none", me+"@"+host)
	})
}

// sluiceSSH does the same with sluice as the client.
func sluiceSSH(k *kit, dir, listen, origin string) ([]*process, error) {
	return throughSSH(dir, func(me, host, port, known string) ([]*process, error) {
		return run1(k.sluice, "forward", listen, origin, "--log-level", "warn", "--via",
			fmt.Sprintf("ssh://%s@%s:%s?identity-file=%s&known-hosts=%s&ssh-config=none",
				me, host, port, filepath.Join(dir, "client"), known))
	})
}

// throughSSH starts an sshd with keys of its own, and a client for it.
func throughSSH(dir string, client func(me, host, port, known string) ([]*process, error)) ([]*process, error) {
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	if os.Getuid() == 0 { // sshd insists on it; in the run's own mount namespace this is not the machine's /run
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return nil, err
		}
	}
	for _, key := range []string{"host", "client"} {
		path := filepath.Join(dir, key)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		p, err := run1("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", path)
		if err != nil {
			return nil, err
		}
		select {
		case <-p[0].done:
		case <-time.After(10 * time.Second):
			p[0].stop()
		}
		if p[0].err != nil {
			return nil, fmt.Errorf("ssh-keygen: %w", p[0].gone())
		}
	}
	server, err := freeAddr()
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(server)
	path, err := conf(dir, "sshd.conf", sshdConf, map[string]any{
		"Listen": server, "Dir": dir})
	if err != nil {
		return nil, err
	}
	pub, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		return nil, err
	}
	known := filepath.Join(dir, "known_hosts")
	if err := os.WriteFile(known, fmt.Appendf(nil, "[%s]:%s %s", host, port, pub), 0o600); err != nil {
		return nil, err
	}
	ps, err := run1("sshd", "-D", "-e", "-f", path)
	if err != nil {
		return nil, err
	}
	if err := waitPort(server, ps); err != nil {
		stopAll(ps)
		return nil, fmt.Errorf("sshd: %w", err)
	}
	started, err := client(me.Username, host, port, known)
	if err != nil {
		stopAll(ps)
		return nil, err
	}
	return append(ps, started...), nil
}

// freeAddr returns a loopback address whose port is free now.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// waitPort waits until addr accepts connections, and fails when one of ps ends or 10 s have passed.
func waitPort(addr string, ps []*process) error {
	return until(ps, func() error {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// waitRelay waits until what is sent to addr is answered by the origin behind it.
func waitRelay(addr string, ps []*process) error {
	return until(ps, func() error {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		b := []byte{opProbe}
		if _, err := c.Write(b); err != nil {
			return err
		}
		_, err = c.Read(b)
		return err
	})
}

func until(ps []*process, ready func() error) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		for _, p := range ps {
			if e := p.gone(); e != nil {
				return e
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not ready after 10 s: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
