package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// test is one kind of load.
type test struct {
	name  string
	group string // what -tests may say for several
	load  load
	place string // where the client is, in a lab: host or lan; empty for a test over loopback
	once  bool   // in the first round only, as there is nothing random in it
}

var allTests = append([]test{
	{name: "up1", group: "bulk", load: load{Kind: "bulk", Conns: 1, Dir: opUpload}},
	{name: "up8", group: "bulk", load: load{Kind: "bulk", Conns: 8, Dir: opUpload}},
	{name: "down1", group: "bulk", load: load{Kind: "bulk", Conns: 1, Dir: opDownload}},
	{name: "down8", group: "bulk", load: load{Kind: "bulk", Conns: 8, Dir: opDownload}},
	{name: "both1", group: "bulk", load: load{Kind: "bulk", Conns: 1, Dir: opBoth}},
	{name: "both8", group: "bulk", load: load{Kind: "bulk", Conns: 8, Dir: opBoth}},
	{name: "pp64", group: "msg", load: load{Kind: "pingpong", Conns: 64}},
	{name: "pp1", group: "msg", load: load{Kind: "pingpong", Conns: 1}},
	{name: "short", group: "conn", load: load{Kind: "short", Conns: 32}},
	{name: "idle", group: "idle", load: load{Kind: "idle"}},
	{name: "scale", group: "scale", load: load{Kind: "scale"}},
}, labTests...)

// usualTests returns those that are run unless others are asked for.
func usualTests() []test {
	return slices.DeleteFunc(slices.Clone(allTests), func(t test) bool { return t.name == "scale" || t.place != "" })
}

// Sample is one measurement of one relay.
type Sample struct {
	Round   int                `json:"round"`
	Test    string             `json:"test"`
	Peer    string             `json:"peer"`
	Values  map[string]float64 `json:"values,omitempty"` // by the keys of the metrics table
	Notes   []string           `json:"notes,omitempty"`
	Err     string             `json:"error,omitempty"`
	Seconds float64            `json:"seconds"` // that the measurement took in all
}

// endProcess is an end of the load as the benchmark sees it.
type endProcess struct {
	*process
	ctx  context.Context // of the measurement
	load bool
	in   io.WriteCloser
	out  io.ReadCloser
	dec  *json.Decoder
}

// ask sends a line and waits for its answer.
func (e *endProcess) ask(q ask, limit time.Duration) (answer, error) {
	if err := json.NewEncoder(e.in).Encode(q); err != nil {
		return answer{}, fmt.Errorf("end: %w", errors.Join(err, e.gone()))
	}
	return e.answer(limit)
}

func (e *endProcess) answer(limit time.Duration) (answer, error) {
	var a answer
	if f, ok := e.out.(*os.File); ok {
		f.SetReadDeadline(time.Now().Add(limit))
		stop := context.AfterFunc(e.ctx, func() { f.SetReadDeadline(time.Now()) })
		defer stop()
	}
	if err := e.dec.Decode(&a); err != nil {
		return a, fmt.Errorf("end does not answer: %w", errors.Join(err, e.gone()))
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

func (e *endProcess) pipes(cmd *exec.Cmd) (err error) {
	if e.in, err = cmd.StdinPipe(); err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // its signals interrupt a poller's thread
	e.out, err = cmd.StdoutPipe()
	e.dec = json.NewDecoder(e.out)
	return err
}

// run is one measurement under way: a fresh origin, a fresh relay, a fresh client.
type run struct {
	ctx    context.Context
	kit    *kit
	dir    string
	lab    *lab  // nil: over loopback
	from   place // of the client in the lab
	ends   []*endProcess
	relay  []*process
	target string // where the client connects
	sample *Sample
}

// newEnd starts an end: "load", or "origin" with its kind and address.
func (r *run) newEnd(args ...string) (*endProcess, error) {
	e := &endProcess{ctx: r.ctx, load: args[0] == "load"}
	at := atOrigin
	if e.load {
		at = r.from
	}
	err := r.within(at, func() (err error) {
		e.process, err = launch(e.pipes, r.kit.self, append([]string{"-end"}, args...)...)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.ends = append(r.ends, e)
	return e, nil
}

// within calls f in the lab, where there is one.
func (r *run) within(at place, f func() error) error {
	if r.lab == nil {
		return f()
	}
	return r.lab.within(at, f)
}

func (r *run) set(key string, v float64) { r.sample.Values[key] = v }

func (r *run) note(format string, args ...any) {
	r.sample.Notes = append(r.sample.Notes, fmt.Sprintf(format, args...))
}

func (r *run) sleep(d time.Duration) error {
	select {
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	case <-time.After(d):
		return nil
	}
}

func (r *run) roots() []int {
	var pids []int
	for _, p := range r.relay {
		pids = append(pids, p.pid())
	}
	return pids
}

func (r *run) holds() footprint { return holds(tree(processes(), r.roots()...)) }

// close kills and reaps all that the measurement has started.
func (r *run) close() {
	for _, e := range r.ends { // the client first, or it sees the relay die and counts failures
		e.stop()
		e.in.Close()
	}
	if r.lab != nil {
		r.closeLab()
		return
	}
	stopAll(r.relay)
}

// snapshot is the counters of everything at one time.
type snapshot struct {
	n, t         []int64 // of each end
	relay, ends  time.Duration
	mine, others time.Duration // of the whole benchmark, and of the rest of the machine
	at           time.Time
	failed       int64
	why          string
}

func (r *run) snapshot() (snapshot, error) {
	var s snapshot
	for _, e := range r.ends {
		a, err := e.ask(ask{Op: "count"}, 10*time.Second)
		if err != nil {
			return s, err
		}
		s.n, s.t = append(s.n, a.N), append(s.t, a.T)
		s.failed += a.Failed
		if a.Why != "" {
			s.why = a.Why
		}
	}
	busy := machineBusy()
	all := processes()
	s.at = time.Now()
	s.relay = cpu(tree(all, r.roots()...))
	for _, e := range r.ends {
		s.ends += cpu(tree(all, e.pid()))
	}
	s.mine = s.relay + s.ends
	for _, p := range all {
		if p.pid == os.Getpid() {
			s.mine += p.own
		}
	}
	s.others = busy - s.mine
	return s, nil
}

// measure runs test t against p for d and returns the sample, with Err set where it failed.
func measure(ctx context.Context, k *kit, dir string, p peer, t test, round int, d time.Duration) *Sample {
	s := &Sample{Round: round, Test: t.name, Peer: p.name, Values: make(map[string]float64)}
	started := time.Now()
	limit := d + time.Minute
	if t.load.Kind == "idle" {
		limit += 3 * time.Minute
	}
	if t.load.Kind == "scale" {
		limit += 8*d + 10*time.Minute
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("hangs: not done after %v", limit))
	defer cancel()
	r := &run{ctx: ctx, kit: k, dir: filepath.Join(dir, p.name), sample: s}
	defer r.close()
	if err := r.begin(p, t, d); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		s.Err = err.Error()
	}
	s.Seconds = time.Since(started).Seconds()
	return s
}

// begin starts the origin and the relay, and measures.
func (r *run) begin(p peer, t test, d time.Duration) error {
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return err
	}
	if t.load.Kind == "scale" {
		return r.scalePoint(p, t.load.Conns, d)
	}
	addr := "127.0.0.1:0"
	if p.lab {
		var err error
		if r.lab, err = newLab(r.kit.congestion); err != nil {
			return err
		}
		r.from = placeOf(t)
		addr = labOrigin + ":0"
	}
	kind := "echo"
	if t.load.Kind == "bulk" || t.load.Kind == "udp" {
		kind = t.load.Kind
	}
	for held := 0; held == 0 || t.load.Kind == "idle" && held < t.load.Conns; held += perProcess {
		o, err := r.newEnd("origin", kind, addr)
		if err != nil {
			return err
		}
		a, err := o.answer(10 * time.Second)
		if err != nil {
			return err
		}
		addr = a.Addr
	}
	start := r.startRelay
	if p.lab {
		start = r.startRouter
	}
	if err := start(p, addr); err != nil {
		return fmt.Errorf("does not start: %w", err)
	}
	return r.point(t, d)
}

// startRelay starts a relay to the origin at addr, over loopback.
func (r *run) startRelay(p peer, addr string) error {
	r.target = addr
	if p.start != nil {
		listen, err := freeAddr()
		if err != nil {
			return err
		}
		if r.relay, err = p.start(r.kit, r.dir, listen, addr); err != nil {
			return err
		}
		r.target = listen
	}
	return waitRelay(r.target, r.relay)
}

// point measures what runs.
func (r *run) point(t test, d time.Duration) error {
	if t.load.Kind == "idle" {
		return r.idlePoint(t.load.Conns)
	}
	c, err := r.newEnd("load")
	if err != nil {
		return err
	}
	q := ask{Op: "start", Load: t.load}
	q.Load.Addr = r.target
	if _, err := c.ask(q, 20*time.Second); err != nil {
		return err
	}
	if err := r.awaitFirst(); err != nil {
		return err
	}
	if err := r.sleep(min(d/4, 500*time.Millisecond)); err != nil { // windows grow, pipes are made, pools fill
		return err
	}
	before, err := r.snapshot()
	if err != nil {
		return err
	}
	if err := r.sleep(d); err != nil {
		return err
	}
	after, err := r.snapshot()
	if err != nil {
		return err
	}
	last, err := c.ask(ask{Op: "stop"}, 10*time.Second)
	if err != nil {
		return err
	}
	for _, p := range r.relay {
		if err := p.gone(); err != nil {
			return fmt.Errorf("under load, %w", err)
		}
	}
	if t.load.Kind == "udp" {
		if err := r.losses(); err != nil {
			return err
		}
	}
	return r.figures(t, before, after, last)
}

// awaitFirst waits until something has come through, or for five seconds: a first packet that gets lost costs a second,
// which is nobody's rate.
func (r *run) awaitFirst() error {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		for _, e := range r.ends {
			a, err := e.ask(ask{Op: "count"}, 10*time.Second)
			if err != nil {
				return err
			}
			if a.N > 0 {
				return nil
			}
		}
		if err := r.sleep(10 * time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// figures works out the values of a point between two snapshots.
func (r *run) figures(t test, a, b snapshot, last answer) error {
	var n int64
	var rate float64 // a second, each end by its own clock
	for i := range a.n {
		n += b.n[i] - a.n[i]
		rate += float64(b.n[i]-a.n[i]) / (float64(b.t[i]-a.t[i]) / 1e9)
	}
	if n == 0 {
		return fmt.Errorf("nothing came through: %s", last.Why)
	}
	relay, ends := (b.relay - a.relay).Seconds(), (b.ends - a.ends).Seconds()
	per, unit := float64(n)/1e4, "cpu_s_per_10k"
	switch t.load.Kind {
	case "bulk":
		r.set("gbit_s", rate*8/1e9)
		per, unit = float64(n)/1e9, "cpu_s_per_gb"
	case "pingpong":
		r.set("msg_s", rate)
		r.set("p50_us", last.P50)
		r.set("p99_us", last.P99)
	case "short":
		r.set("conn_s", rate)
	case "udp":
		r.datagramFigures(a, b)
		n -= b.n[1] - a.n[1] // what was sent is not what was received
		per, unit = float64(n)*datagram/1e9, "cpu_s_per_gb"
	}
	r.set("relay_"+unit, relay/per)
	r.set("ends_"+unit, ends/per)
	if ends > 0 {
		r.set("relay_to_ends", relay/ends)
	}
	if f := b.failed - a.failed; f > 0 {
		r.note("%d failed: %s", f, b.why)
	}
	cores := b.at.Sub(a.at).Seconds() * float64(coreCount())
	r.set("others_percent", max(0, 100*(b.others-a.others).Seconds()/cores))
	return nil
}
