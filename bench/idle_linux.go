package main

import (
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// openers is how many idle connections are opened, or used in the burst, at a time.
const openers = 32

// burstBytes is what each idle relay moves in each direction in the burst.
const burstBytes = 256 << 10

// idleAfter is how long a relay is left alone before it is idle.
const idleAfter = 4 * time.Second

// perProcess is how many idle connections a client or an origin process holds at most.
const perProcess = 9000

// holdIdle opens the connections and has each answered once. It stops opening at the first that fails,
// since a relay that is out of descriptors fails all that follow. n is how many are held.
func (c *client) holdIdle() error {
	d := net.Dialer{Timeout: 5 * time.Second, KeepAlive: -1} // whether there are probes is the relay's choice
	if c.From != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(c.From)}
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	for range openers {
		wg.Add(1)
		go c.openIdle(&wg, &d, &next)
	}
	wg.Wait()
	c.n.Store(int64(len(c.idle)))
	if len(c.idle) == 0 {
		return fmt.Errorf("none could be held: %w", c.why)
	}
	return nil
}

func (c *client) openIdle(wg *sync.WaitGroup, d *net.Dialer, next *atomic.Int64) {
	defer wg.Done()
	for next.Add(1) <= int64(c.Conns) && c.failed.Load() == 0 {
		began := time.Now()
		conn, err := d.Dial("tcp", c.Addr)
		if err != nil {
			c.fail(err)
			return
		}
		if err := roundTrip(conn, message, 5*time.Second); err != nil {
			c.fail(err)
			conn.Close()
			return
		}
		c.mu.Lock()
		c.idle = append(c.idle, conn)
		c.opened = append(c.opened, int32(min(time.Since(began), 2*time.Second)))
		c.mu.Unlock()
	}
}

// burst moves burstBytes there and back on every idle connection, openers at a time.
func (c *client) burst() error {
	var wg sync.WaitGroup
	var next atomic.Int64
	before := c.failed.Load()
	for range openers {
		wg.Add(1)
		go c.burstIdle(&wg, &next)
	}
	wg.Wait()
	if n := c.failed.Load() - before; n > 0 {
		return fmt.Errorf("%d of %d idle relays failed in the burst: %w", n, len(c.idle), c.why)
	}
	return nil
}

func (c *client) burstIdle(wg *sync.WaitGroup, next *atomic.Int64) {
	defer wg.Done()
	for {
		i := int(next.Add(1)) - 1
		if i >= len(c.idle) {
			return
		}
		if err := roundTrip(c.idle[i], burstBytes, 20*time.Second); err != nil {
			c.fail(err)
			return
		}
	}
}

// roundTrip sends n bytes and reads as many.
func roundTrip(conn net.Conn, n int, limit time.Duration) error {
	conn.SetDeadline(time.Now().Add(limit))
	if n <= message {
		buf := make([]byte, n)
		if _, err := conn.Write(buf); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, buf)
		return err
	}
	sent := make(chan error, 1)
	go send(conn, n, sent)
	_, err := io.CopyN(io.Discard, conn, int64(n))
	if e := <-sent; err == nil {
		err = e
	}
	return err
}

func send(conn net.Conn, n int, sent chan<- error) {
	_, err := conn.Write(make([]byte, n))
	sent <- err
}

// idlePoint measures what idle relays hold, on a relay that has been started.
func (r *run) idlePoint(n int) error {
	if err := r.sleep(200 * time.Millisecond); err != nil { // the relay closes what waitRelay has left
		return err
	}
	started := time.Now()
	before := r.holds()
	held := 0.0
	for i := 0; held < float64(n); i++ {
		c, err := r.newEnd("load")
		if err != nil {
			return err
		}
		part := min(perProcess, n-int(held))
		from := "" // in a lab: one process is enough there
		if r.lab == nil {
			from = fmt.Sprintf("127.0.0.%d", 2+i)
		}
		a, err := c.ask(ask{Op: "start", Load: load{Kind: "idle", Addr: r.target, Conns: part, From: from}}, time.Minute)
		if err != nil {
			return err
		}
		held += float64(a.N)
		if a.Why != "" {
			r.note("%.0f held, the next failed: %s", held, a.Why)
		}
		if int(a.N) < part {
			break
		}
	}
	r.set("held", held)
	r.set("open_s", time.Since(started).Seconds())
	if err := r.sleep(idleAfter); err != nil {
		return err
	}
	idle := r.holds()
	per := func(after, before float64) float64 { return (after - before) / held }
	r.set("rss_kib", per(idle.rss, before.rss))
	r.set("pss_kib", per(idle.pss, before.pss))
	r.set("fds", per(float64(idle.fds), float64(before.fds)))
	r.set("pipes", float64(idle.pipes-before.pipes))
	busy := cpu(tree(processes(), r.roots()...))
	if err := r.sleep(time.Second); err != nil {
		return err
	}
	r.set("idle_cpu_ms_per_s", float64((cpu(tree(processes(), r.roots()...)) - busy).Milliseconds()))
	if r.lab != nil {
		return nil
	}
	for _, c := range r.ends {
		if c.load {
			if _, err := c.ask(ask{Op: "burst"}, 90*time.Second); err != nil {
				return err
			}
		}
	}
	if err := r.sleep(idleAfter); err != nil {
		return err
	}
	after := r.holds()
	r.set("rss_burst_kib", per(after.rss, before.rss))
	r.set("pss_burst_kib", per(after.pss, before.pss))
	r.set("pipes_burst", float64(after.pipes-before.pipes))
	return nil
}
