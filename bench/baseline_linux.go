package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// baselines are the relays that live in this binary: what -serve takes. Each owns both conns.
var baselines = map[string]func(client, origin *net.TCPConn){
	"iocopy":    iocopy,
	"pooled":    pooled,
	"closeboth": closeboth,
	"relay":     join,
}

// serve relays every connection that LISTEN accepts to ORIGIN, until it is killed.
func serve(args []string) int {
	if len(args) != 3 || baselines[args[0]] == nil {
		fmt.Fprintln(os.Stderr, "usage: bench -serve iocopy|pooled|closeboth|relay LISTEN ORIGIN")
		return 2
	}
	lc := net.ListenConfig{Control: sockopt.ReusePort} // one of several, in the test scale
	ln, err := lc.Listen(context.Background(), "tcp", args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return 0
		}
		if err != nil { // out of descriptors: those that are held go on
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go serveOne(baselines[args[0]], c.(*net.TCPConn), args[2])
	}
}

func serveOne(carry func(client, origin *net.TCPConn), c *net.TCPConn, origin string) {
	o, err := net.DialTimeout("tcp", origin, 5*time.Second)
	if err != nil {
		c.SetLinger(0)
		c.Close()
		return
	}
	carry(c, o.(*net.TCPConn))
}

// join is sluice's way.
func join(c, o *net.TCPConn) { new(relay.Relay).Start(c, o, nil, nil) }

// iocopy is the usual relay with half-close: two io.Copy, which splice on Linux.
func iocopy(c, o *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Add(1)
	go iocopyHalf(&wg, o, c)
	io.Copy(c, o)
	c.CloseWrite()
	wg.Wait()
	c.Close()
	o.Close()
}

func iocopyHalf(wg *sync.WaitGroup, dst, src *net.TCPConn) {
	defer wg.Done()
	io.Copy(dst, src)
	dst.CloseWrite()
}

// buffers32 and buffers16 hold the buffers of the copying relays.
var (
	buffers32 = sync.Pool{New: func() any { return new([32 << 10]byte) }}
	buffers16 = sync.Pool{New: func() any { return new([16 << 10]byte) }}
)

// plain hides what else a conn can do, so that io.CopyBuffer really uses its buffer.
type plain struct{ io.ReadWriter }

// pooled copies through pooled buffers, in user space, with half-close.
func pooled(c, o *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Add(1)
	go pooledHalf(&wg, o, c)
	wg.Add(1)
	pooledHalf(&wg, c, o)
	wg.Wait()
	c.Close()
	o.Close()
}

func pooledHalf(wg *sync.WaitGroup, dst, src *net.TCPConn) {
	defer wg.Done()
	buf := buffers32.Get().(*[32 << 10]byte)
	io.CopyBuffer(plain{dst}, plain{src}, buf[:])
	buffers32.Put(buf)
	dst.CloseWrite()
}

// closeboth copies through pooled buffers and closes both conns when either direction ends.
func closeboth(c, o *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Add(1)
	go closebothHalf(&wg, o, c)
	wg.Add(1)
	closebothHalf(&wg, c, o)
	wg.Wait()
}

func closebothHalf(wg *sync.WaitGroup, dst, src *net.TCPConn) {
	defer wg.Done()
	buf := buffers16.Get().(*[16 << 10]byte)
	io.CopyBuffer(plain{dst}, plain{src}, buf[:])
	buffers16.Put(buf)
	dst.Close()
	src.Close()
}

// fill puts a peer's addresses into its command line.
func fill(args []string, listen, origin string) []string {
	r := strings.NewReplacer("{listen}", listen, "{origin}", origin)
	filled := make([]string, len(args))
	for i, a := range args {
		filled[i] = r.Replace(a)
	}
	return filled
}
