package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// silenceWait is the silence that ends sessions of datagrams while the program stops.
const silenceWait = time.Second

// abortWait is how long aborted sessions may take to be gone.
const abortWait = 5 * time.Second

// service is an inbound with its engine.
type service struct {
	bound   config.Bound
	engine  *proxy.Engine
	handler proxy.Handler // the engine, or what stands in front of it
}

// addr returns where the service listens: the port is known even if the kernel chose it.
func (s *service) addr() net.Addr {
	if b, ok := s.bound.Inbound.(interface{ BoundAddr() net.Addr }); ok {
		return b.BoundAddr()
	}
	return nil
}

func (s *service) serve(ctx context.Context, ended chan<- error) {
	ended <- s.bound.Inbound.Serve(ctx, s.handler)
}

// close takes no new clients from now on.
func (s *service) close() error {
	err := s.bound.Inbound.Close()
	if a, ok := s.handler.(interface{ Abort() }); ok {
		a.Abort()
	}
	return err
}

// addProcessors gives Go's scheduler twice the processors, unless the user has said how many, and returns what undoes that. The
// relay has a loop for every two of them, each of which keeps one, even while it waits for its sockets. So there is
// a loop for each processor of the machine then, and as many processors are left for goroutines, which would wait for tens
// of milliseconds otherwise. Where goroutines carry the bytes it costs more than it brings.
func (p *program) addProcessors() (undo func()) {
	if n, _ := p.lookupEnv("GOMAXPROCS"); n != "" {
		return func() {}
	}
	was := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(2 * was)
	return func() { runtime.GOMAXPROCS(was) }
}

// serve listens at all inbounds of c, says so by announce (nil: in the log), and serves until a signal.
func (p *program) serve(ctx context.Context, c *config.Config, announce func(*config.Config, []*service)) error {
	defer signal.Stop(outliveReaders()) // after flush
	log, flush := p.logger(c.Log)
	defer flush()
	if c.OnlySockets() {
		defer p.addProcessors()()
	}
	c.Ask(openTerminal())
	bounds, err := c.Build(log, p.lookupEnv)
	if err != nil {
		return err
	}
	// The runtime has raised the soft limit on descriptors to the hard one: importing os is enough.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, stopSignals()...)
	defer signal.Stop(signals)
	defer closeAll(bounds) // before signals end the process again: it undoes what was changed of the machine's network
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	// To listen may take time, where a server has to be reached and a person to be asked.
	listening, done := signal.NotifyContext(ctx, stopSignals()...)
	services, err := listen(listening, c, bounds, log)
	done()
	if err != nil {
		return err
	}
	for i := range bounds {
		if err := bounds[i].Start(); err != nil {
			return errors.Join(err, closeServices(services))
		}
	}
	if announce != nil {
		announce(c, services)
	} else {
		for _, s := range services {
			log.Info("listening", "inbound", s.bound.Name, "addr", s.addr().String())
		}
	}

	tidy := startTidier()
	defer tidy.stop()
	ended := make(chan error, len(services))
	for _, s := range services {
		go s.serve(ctx, ended)
	}
	running := len(services)
	var failed error
	select {
	case <-signals:
	case <-ctx.Done():
	case failed = <-ended: // none ends by itself but by failing
		running--
	}
	return errors.Join(failed, stop(ctx, services, running, ended, signals, c.Grace.Wait(), log))
}

// stopSignals returns the signals that end the program in order. A terminal that is closed is one, too, unless that is
// to be ignored (nohup): what was changed of the machine's network must not stay.
func stopSignals() []os.Signal {
	all := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		all = append(all, syscall.SIGHUP)
	}
	return all
}

// outliveReaders has this process go on where nobody reads what it writes any more. Who reads the log, as tee, may be gone before the
// end, at Ctrl-C for one, and SIGPIPE would keep us from undoing what was changed of the machine's network.
func outliveReaders() chan os.Signal {
	nobody := make(chan os.Signal, 1)
	signal.Notify(nobody, syscall.SIGPIPE)
	return nobody
}

func closeAll(bounds []config.Bound) {
	for i := range bounds {
		bounds[i].Close()
	}
}

// listen binds all inbounds, or none: the error joins what is wrong with each.
func listen(ctx context.Context, c *config.Config, bounds []config.Bound, log *slog.Logger) ([]*service, error) {
	var services []*service
	var errs []error
	for _, b := range bounds {
		if err := b.Inbound.Listen(ctx); err != nil {
			errs = append(errs, err)
			continue
		}
		s := &service{bound: b, engine: &proxy.Engine{
			Router: b.Router, Relay: b.Relay, DialTimeout: c.DialTimeout.Wait(), Log: log,
		}}
		s.handler = s.engine
		if b.Front != nil {
			s.handler = b.Front(s.engine)
		}
		services = append(services, s)
	}
	if len(errs) > 0 {
		return nil, errors.Join(append(errs, closeServices(services))...)
	}
	return services, nil
}

func closeServices(services []*service) error {
	var errs []error
	for _, s := range services {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// stop ends the services, of which so many run: no new clients from now on, grace for the sessions there
// are, and then, or at another signal, their abortion.
func stop(ctx context.Context, services []*service, running int, ended <-chan error, signals <-chan os.Signal,
	grace time.Duration, log *slog.Logger) error {
	var errs []error
	sessions := 0
	for _, s := range services {
		if err := s.close(); err != nil {
			errs = append(errs, err)
		}
		sessions += s.engine.Sessions()
	}
	if sessions > 0 && grace > 0 {
		log.Info(fmt.Sprintf("stopping: %s, waiting up to %v", count(sessions, "session"), grace))
	}
	wait := time.NewTimer(grace)
	defer wait.Stop()
	silent := time.NewTicker(silenceWait / 4)
	defer silent.Stop()
	done, aborting := ctx.Done(), false
	for running > 0 {
		select {
		case <-silent.C:
			for _, s := range services {
				s.engine.EndSilent(silenceWait)
			}
			continue
		case err := <-ended:
			if running--; err != nil {
				errs = append(errs, err)
			}
			continue
		case <-wait.C:
		case <-signals:
		case <-done:
			done = nil
		}
		if aborting {
			return errors.Join(append(errs, errors.New("sessions did not end although they were aborted"))...)
		}
		aborting = true
		sessions = 0
		for _, s := range services {
			sessions += s.engine.Abort()
		}
		if sessions > 0 {
			log.Warn("aborted " + count(sessions, "session"))
		}
		wait.Reset(abortWait)
	}
	return errors.Join(errs...)
}
