package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() { os.Exit(run0(os.Args[1:])) }

// run0 is main: the benchmark, or one of the parts that it starts.
func run0(args []string) int {
	if len(args) > 0 {
		switch args[0] {
		case "-serve":
			return serve(args[1:])
		case "-end":
			return end(args[1:])
		}
	}
	b, err := parse(args, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := b.main(ctx, args); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) { // the benchmark inside has said it
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		return 1
	}
	return 0
}

// bench is a benchmark as it was asked for.
type bench struct {
	rounds     int
	time       time.Duration
	idle       int
	scale      int
	processes  int // of each relay that holds them; 0: as few as can
	quick      bool
	peers      string
	tests      string
	json       string
	sluice     string
	congestion string
	threads    int
	commands   []peer
	printConf  bool
	isolation  string // how the run is isolated, for the report
	log        io.Writer
}

func parse(args []string, out io.Writer) (*bench, error) {
	b := &bench{log: os.Stderr}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(out)
	f.IntVar(&b.rounds, "rounds", 3, "rounds; in each, the relays take turns")
	f.DurationVar(&b.time, "time", 3*time.Second, "length of a measurement")
	f.IntVar(&b.idle, "idle", 5000, "idle relays to hold")
	f.IntVar(&b.scale, "scale", 50000, "idle relays to hold in the test scale, which is run when -tests names it only")
	f.IntVar(&b.processes, "scale-processes", 0,
		fmt.Sprintf("processes of a relay that share a port in the test scale (default as few as hold them, at most %d each)",
			relaysPerProcess))
	f.BoolVar(&b.quick, "quick", false, "one short round of six tests, in under two minutes")
	f.StringVar(&b.peers, "peers", "", "relays to measure, separated by commas (default all)")
	f.StringVar(&b.tests, "tests", "",
		"tests or groups to run, separated by commas (default bulk,msg,conn,idle; the others are scale, and\n"+
			"transparent with its halves host and lan)")
	f.StringVar(&b.json, "json", "", "also write every sample to `file`")
	f.StringVar(&b.sluice, "sluice", "", "the sluice `binary` to measure (default: build ./cmd/sluice)")
	f.StringVar(&b.congestion, "congestion", "reno",
		"congestion control in the run's own network namespace; empty for the machine's")
	f.IntVar(&b.threads, "threads", 0, "threads of each relay (default one a core)")
	f.BoolVar(&b.printConf, "config", false, "print the templates of the peers' configurations and end")
	f.Func("exec", "one more relay: `name=command` with {listen} and {origin} in it; may repeat", b.addCommand)
	f.Usage = func() {
		fmt.Fprintln(out, "usage: bench [flags]   measures sluice beside other relays; see go doc ./bench")
		f.PrintDefaults()
	}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if b.rounds < 1 || b.idle < 1 || b.time < 10*time.Millisecond {
		return nil, errors.New("-rounds and -idle must be 1 or more, -time 10ms or more")
	}
	if b.scale < 1 || b.processes < 0 || max(b.processes, scaleProcesses(b.scale, 20000)) > 250 {
		return nil, errors.New("-scale must be 1 or more, and take no more than 250 processes")
	}
	given := make(map[string]bool)
	f.Visit(func(f *flag.Flag) { given[f.Name] = true })
	b.fill(given)
	return b, nil
}

// fill sets the defaults that depend on other flags.
func (b *bench) fill(given map[string]bool) {
	if b.tests == "transparent" && !given["time"] { // it has many points
		b.time = 600 * time.Millisecond
	}
	if !b.quick {
		return
	}
	if !given["rounds"] {
		b.rounds = 1
	}
	if !given["time"] {
		b.time = 400 * time.Millisecond
	}
	if !given["idle"] {
		b.idle = 300
	}
	switch b.tests {
	case "":
		b.tests = "up1,down8,pp64,pp1,short,idle"
	case "transparent":
		b.tests = quickTransparent
	}
}

func (b *bench) addCommand(v string) error {
	name, line, ok := strings.Cut(v, "=")
	args := strings.Fields(line)
	if !ok || name == "" || len(args) == 0 {
		return errors.New(`want name=command, as in "x=redir --lport={listen} {origin}"`)
	}
	b.commands = append(b.commands, peer{name: name, about: line, needs: args[:1], start: command(args)})
	return nil
}

// main builds what is measured, and runs the benchmark in namespaces of its own, or here where they
// cannot be had.
func (b *bench) main(ctx context.Context, args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if dir := os.Getenv(insideEnv); dir != "" {
		if err := settleIn(b.congestion); err != nil {
			return err
		}
		b.isolation = "own namespaces"
		return b.run(ctx, self, dir, os.Stdout)
	}
	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // nginx's workers are another user
		return err
	}
	b.build(ctx, dir)
	if err := canIsolate(self); err != nil {
		b.isolation = fmt.Sprintf("none (%v): the machine's own loopback, other traffic, and congestion control", err)
		return b.run(ctx, self, dir, os.Stdout)
	}
	cmd := isolated(exec.CommandContext(ctx, self, args...))
	cmd.Env = append(os.Environ(), insideEnv+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd.Run()
}

// isProgram says whether the peer called name is the sluice program.
func isProgram(name string) bool {
	return name == "sluice" || name == "sluice-ssh" || slices.ContainsFunc(labPeers, func(p peer) bool {
		return p.name == name && p.args != nil
	})
}

// build compiles sluice into dir, or leaves the reason there why it cannot.
func (b *bench) build(ctx context.Context, dir string) {
	if b.sluice != "" || b.peers != "" && !slices.ContainsFunc(strings.Split(b.peers, ","), isProgram) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "sluice.bin"),
		"github.com/sluice-proxy/sluice/cmd/sluice")
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		why := fmt.Appendf(nil, "go build ./cmd/sluice: %v: %s", err, first)
		os.WriteFile(filepath.Join(dir, "sluice.why"), why, 0o600)
	}
}

// newKit finds what peers are started with.
func (b *bench) newKit(self, dir string) *kit {
	k := &kit{self: self, threads: b.threads, processes: b.processes, fds: openFiles(b.idle), sluice: b.sluice,
		congestion: b.congestion}
	if k.sluice == "" {
		k.sluice = filepath.Join(dir, "sluice.bin")
		if _, err := os.Stat(k.sluice); err != nil {
			why, _ := os.ReadFile(filepath.Join(dir, "sluice.why"))
			k.sluice, k.why = "", errors.New(string(why))
		}
	} else if path, err := filepath.Abs(k.sluice); err == nil {
		k.sluice = path
	}
	if b.threads > 0 {
		os.Setenv("GOMAXPROCS", fmt.Sprint(b.threads)) // the Go relays; an end overrides it
	}
	return k
}

// pick returns those of all whose name or group stands in a list with commas, all for an empty list.
func pick[T any](list string, all []T, is func(T, string) bool) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var picked []T
	wanted := strings.Split(list, ",")
	for _, name := range wanted {
		if !slices.ContainsFunc(all, func(t T) bool { return is(t, name) }) {
			return nil, fmt.Errorf("there is no %q", name)
		}
	}
	for _, t := range all {
		if slices.ContainsFunc(wanted, func(name string) bool { return is(t, name) }) {
			picked = append(picked, t)
		}
	}
	return picked, nil
}

func (p peer) is(name string) bool { return p.name == name }
func (t test) is(name string) bool { return t.name == name || t.group == name || t.place == name }

// takes says whether p is measured with t.
func (p peer) takes(t test) bool {
	if p.lab != (t.place != "") || slices.Contains(p.not, t.load.Kind) {
		return false
	}
	switch t.load.Kind {
	case "idle":
		return p.start != nil || p.args != nil
	case "scale":
		return p.many != nil
	}
	return true
}

// run measures every test against every peer, round by round, and writes the report.
func (b *bench) run(ctx context.Context, self, dir string, out io.Writer) error {
	adopt()
	k := b.newKit(self, dir)
	peers, err := pick(b.peers, append(allPeers(k), b.commands...), peer.is)
	if err != nil {
		return fmt.Errorf("-peers: %w", err)
	}
	tests, err := pick(b.tests, allTests, test.is)
	if err != nil {
		return fmt.Errorf("-tests: %w", err)
	}
	if b.tests == "" {
		tests = usualTests()
	}
	peers = slices.DeleteFunc(slices.Clone(peers), func(p peer) bool {
		return !slices.ContainsFunc(tests, p.takes)
	})
	if b.printConf {
		_, err := fmt.Fprintf(out, "# haproxy.cfg\n%s\n# nginx.conf\n%s\n# sshd.conf\n%s",
			haproxyConf, nginxConf, sshdConf)
		return err
	}
	r := newReport(b, k, peers, tests)
	began := time.Now()
	for round := range b.rounds {
		for _, t := range tests {
			switch t.load.Kind {
			case "idle":
				t.load.Conns = b.idle
			case "scale":
				t.load.Conns = b.scale
			}
			for _, p := range peers {
				if r.missing[p.name] != "" || !p.takes(t) || t.once && round > 0 {
					continue
				}
				s := measure(ctx, k, dir, p, t, round+1, b.time)
				if ctx.Err() != nil {
					return errors.New("interrupted")
				}
				r.add(s)
				fmt.Fprintf(b.log, "%d/%d %-10s %-14s %s\n", round+1, b.rounds, t.name, p.name, s)
			}
		}
	}
	r.Took = time.Since(began).Round(time.Second).String()
	if b.json != "" {
		if err := r.writeJSON(b.json); err != nil {
			return err
		}
	}
	return r.markdown(out)
}

func coreCount() int { return runtime.NumCPU() }
