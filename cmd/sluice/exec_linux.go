package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/dns"
	"github.com/sluice-proxy/sluice/internal/enclosure"
	"github.com/sluice-proxy/sluice/internal/netstack"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// exec runs the command at path with args, and returns a commandEnded. For a command that a signal has ended it does
// not return: this process ends by the same.
func (p *program) exec(ctx context.Context, o *execOptions, path string, args []string) error {
	c, in := o.wayOut()
	in.Name = "exec"
	log, flush := p.logger(c.Log)
	defer flush()
	c.Ask(openTerminal())
	way, err := c.Way(in, log, p.lookupEnv)
	if e, ok := errors.AsType[*config.Error](err); ok {
		return &usageError{e}
	}
	if err != nil {
		return err
	}
	defer way.Close()
	r := &execution{log: log, way: way, grace: c.Grace.Wait()}
	if len(o.in.Via) == 0 {
		r.pinger = &netstack.Pinger{Control: o.control()}
	}
	r.engine = &proxy.Engine{Router: way.Router, Relay: way.Relay, DialTimeout: c.DialTimeout.Wait(), Log: log}
	if !o.sessions {
		r.engine.Log = slog.New(&datagramsRefused{log: log})
	}
	mode, resolver, _ := dns.ParseMode(in.DNS.String()) // the flag has read it
	r.names = &dns.Handler{Next: r.engine, Mode: mode, Router: way.Router, Resolver: resolver, Log: log}
	r.network = enclosedNetwork(mode, in.MTU)
	signals := notifyOfSignals()
	outliveReaders() // the command may
	status, err := r.run(ctx, path, args, signals)
	signal.Stop(signals)
	switch {
	case err != nil:
		return err
	case status.Signaled():
		way.Close()
		flush()
		endBy(status.Signal())
	}
	return commandEnded(status.ExitStatus())
}

// control sets what the flags say of sockets.
func (o *options) control() sockopt.Control {
	var all []sockopt.Control
	if o.direct.Mark != 0 {
		all = append(all, sockopt.Mark(o.direct.Mark))
	}
	if o.direct.Interface != "" {
		all = append(all, sockopt.Device(o.direct.Interface))
	}
	return sockopt.All(all...)
}

// execution is a run of exec.
type execution struct {
	log     *slog.Logger
	way     config.Bound
	pinger  *netstack.Pinger // nil where the way out has hops
	engine  *proxy.Engine
	names   *dns.Handler
	network enclosure.Network
	grace   time.Duration
	served  chan error
}

// run runs the command and its network to their ends.
func (r *execution) run(ctx context.Context, path string, args []string, signals chan os.Signal) (unix.WaitStatus, error) {
	process, err := enclosure.Start(path, args, r.network)
	if err != nil {
		return 0, err
	}
	r.names.NoIPv6 = process.NoIPv6
	stack := &netstack.Stack{
		Name: r.way.Name,
		Open: func(context.Context) (*tundev.Device, error) { return process.Device, nil },
		Log:  r.log,
	}
	if r.pinger != nil {
		stack.Ping = r.ping
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := stack.Listen(ctx); err != nil {
		process.Kill()
		process.Wait()
		return 0, err
	}
	r.served = make(chan error, 1)
	go r.serve(ctx, stack)
	err = r.way.Start()
	if err == nil {
		err = process.Release()
	}
	if err != nil {
		process.Kill()
	}
	ended := make(chan struct{})
	forwarded := make(chan struct{})
	go forwardSignals(process, signals, ended, forwarded)
	status, waitErr := process.Wait()
	close(ended)
	<-forwarded
	if err == nil {
		err = waitErr
	}
	if err == nil {
		r.flush(signals)
	}
	stack.Close()
	r.names.Abort()
	r.engine.Abort()
	cancel()
	if served := <-r.served; served != nil && err == nil {
		r.log.Error("the command's network failed", "err", served)
	}
	return status, err
}

func (r *execution) serve(ctx context.Context, stack *netstack.Stack) {
	r.served <- stack.Serve(ctx, r.names)
}

// ping asks the host that dst stands for. Proxies have no word for that.
func (r *execution) ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	if name, ok := r.names.NameOf(dst); ok {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		if err != nil {
			return err
		}
		dst = addrs[0].Unmap()
	}
	return r.pinger.Ping(ctx, dst, payload)
}

// flush waits while the streams pass on what the command left, which it may have been sure of when it ended: as long as
// something moves. What ended with an answer has none by now.
func (r *execution) flush(signals <-chan os.Signal) {
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	n, moved := r.engine.Streams()
	for since := time.Now(); n > 0 && time.Since(since) < r.grace; {
		select {
		case <-look.C:
			before := moved
			if n, moved = r.engine.Streams(); moved != before {
				since = time.Now()
			}
		case s := <-signals:
			if s != unix.SIGWINCH {
				return
			}
		}
	}
}

// enclosedNetwork returns what the command's network is to be. All in it is reached by one device, so the addresses need be
// no others than those that the fake ones are never of.
func enclosedNetwork(mode dns.Mode, mtu int) enclosure.Network {
	v4, v6 := dns.Prefixes()
	first4 := v4.Addr().Next()
	first6 := v6.Addr().Next()
	n := enclosure.Network{
		Addrs: []netip.Prefix{netip.PrefixFrom(first4, first4.BitLen()), netip.PrefixFrom(first6, first6.BitLen())},
		MTU:   mtu,
	}
	if mode != dns.Off {
		n.Nameserver = first4.Next()
	}
	return n
}

// datagramsRefused is where the records of sessions go when nobody asked for them. The command hears by itself how its
// connections end; but that all of its datagrams are refused is due to the way out, and is said, once.
type datagramsRefused struct {
	log  *slog.Logger
	said atomic.Bool
}

// Enabled implements slog.Handler.
func (d *datagramsRefused) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && !d.said.Load()
}

// Handle implements slog.Handler.
func (d *datagramsRefused) Handle(_ context.Context, r slog.Record) error {
	var dst, via, reason string
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "dst":
			dst = a.Value.String()
		case "via":
			via = a.Value.String()
		case "reason":
			reason = a.Value.String()
		}
		return true
	})
	if reason == proxy.Unsupported.String() && strings.HasPrefix(dst, "udp://") && !d.said.Swap(true) {
		d.log.Warn("the way out carries no UDP: the command's datagrams are refused, all but its DNS", "via", via, "first", dst)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (d *datagramsRefused) WithAttrs([]slog.Attr) slog.Handler { return d }

// WithGroup implements slog.Handler.
func (d *datagramsRefused) WithGroup(string) slog.Handler { return d }

// The signals that a terminal sends to all of its foreground's processes, and so to the command, too; and those that who
// runs sluice sends to it, and means the command.
func terminalSignals() []os.Signal {
	return []os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGWINCH}
}

func otherSignals() []os.Signal {
	return []os.Signal{unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM}
}

// notifyOfSignals has the signals come to a channel. Those that are ignored stay so, for the command as well.
func notifyOfSignals() chan os.Signal {
	signals := make(chan os.Signal, 16)
	for _, s := range append(terminalSignals(), otherSignals()...) {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals
}

// forwardSignals passes signals on to the command until it has ended.
func forwardSignals(process *enclosure.Process, signals <-chan os.Signal, ended <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	for {
		select {
		case s := <-signals:
			if !fromTerminal(s) {
				process.Signal(s)
			}
		case <-ended:
			return
		}
	}
}

// fromTerminal says whether s has come to the command by itself, as far as can be told: from the terminal, whose
// foreground this process is in.
func fromTerminal(s os.Signal) bool {
	known := false
	for _, t := range terminalSignals() {
		known = known || s == t
	}
	if !known {
		return false
	}
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// endBy ends this process as the command was: who waits for it, as a shell, sees the signal. The runtime would handle some
// signals itself, and print what is of no interest; and the core, where one was wanted, is the command's.
func endBy(sig syscall.Signal) {
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	var byDefault [8]uint64 // struct sigaction: all of it is zero, on all processors
	unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
	unix.Kill(unix.Getpid(), sig)
	time.Sleep(time.Second) // until some thread takes it
	os.Exit(128 + int(sig))
}
