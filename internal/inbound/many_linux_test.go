package inbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// 10 000 clients come and go, in every way a client can end, and nothing is left.
func TestManyShortConns(t *testing.T) {
	t.Run("tcp", func(t *testing.T) { manyShortConns(t, loopback, 200) })
	t.Run("unix", func(t *testing.T) { // most, because it uses up no ports
		manyShortConns(t, unixAddr(filepath.Join(t.TempDir(), "s")), 800)
	})
}

func manyShortConns(t *testing.T, addr proxy.Addr, each int) {
	const workers = 10
	h := &proxytest.RecordingHandler{}
	a := startInbound(t, &Forward{Listener: Listener{Addr: addr, MaxConns: 64}, To: loopback}, h)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := range each {
				if err := shortConn(a, w+i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	// Those who left at once may still be in the kernel's queue.
	proxytest.Until(t, "every client was taken in", func() bool { return len(h.Flows()) == workers*each })
}

func shortConn(a net.Addr, i int) error {
	c, err := net.Dial(a.Network(), a.String())
	for ; errors.Is(err, syscall.EAGAIN); c, err = net.Dial(a.Network(), a.String()) {
		time.Sleep(time.Millisecond) // the queue is full
	}
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	if i%4 == 0 { // leaves without a word
		return nil
	}
	if _, err := io.WriteString(c, "ping"); err != nil {
		return err
	}
	if i%4 == 1 { // leaves before the answer
		return nil
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
		return fmt.Errorf("%q, %w", b, err)
	}
	if i%4 == 2 {
		c.(relay.HalfCloser).CloseWrite()
		_, err = io.Copy(io.Discard, c)
	}
	return err
}

// For want of descriptors accepting pauses, says so once, and goes on when there are some.
// The test runs itself with few descriptors, so that those of the other tests are enough.
func TestAcceptOutlastsEMFILE(t *testing.T) {
	if os.Getenv("SLUICE_TEST_EMFILE") != "" {
		serveWithFewFiles()
		os.Exit(0)
	}
	proxytest.NoLeaks(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestAcceptOutlastsEMFILE$")
	cmd.Env = append(os.Environ(), "SLUICE_TEST_EMFILE=1")
	log := new(logBuffer)
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close() // ends it
	var addr string
	if _, err := fmt.Fscanln(stdout, &addr); err != nil {
		t.Fatalf("%v: %s", err, log.b.String())
	}
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}

	var conns []net.Conn
	for range 2 * fewFiles {
		c := dial(t, a) // the kernel's queue takes them
		io.WriteString(c, "x")
		conns = append(conns, c)
	}
	proxytest.Until(t, "accepting pauses", func() bool { return log.count("accepting paused") > 0 })
	before := cpuTime(t, cmd.Process.Pid)
	time.Sleep(300 * time.Millisecond) // paused, for 5+10+…+160 ms: six tries
	if spent := cpuTime(t, cmd.Process.Pid) - before; spent > 150*time.Millisecond {
		t.Errorf("it spins: %v of CPU in 300 ms", spent)
	}
	for i, c := range conns { // as they leave, the others get in
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatalf("client %d of %d: %v\n%s", i, len(conns), err, log.b.String())
		}
		c.Close()
	}
	proxytest.Until(t, "accepting goes on", func() bool { return log.count("accepting again") > 0 })
	if p, a := log.count("accepting paused"), log.count("accepting again"); p > 3 || a > p {
		t.Errorf("paused is said %d times, again %d times", p, a)
	}
	if log.count("ulimit -n") == 0 {
		t.Errorf("no hint:\n%s", log.b.String())
	}
}

// fewFiles is how many clients the child has descriptors for, about.
const fewFiles = 20

// serveWithFewFiles echoes at a port that it prints, until its standard input ends.
func serveWithFewFiles() {
	l := &Listener{Addr: loopback, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if err := l.Listen(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	entries, _ := os.ReadDir("/proc/self/fd")
	limit := syscall.Rlimit{Cur: uint64(len(entries) + fewFiles), Max: uint64(len(entries) + fewFiles)}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	end := make(chan error)
	go func() { end <- l.serve(context.Background(), echo) }()
	fmt.Println(l.BoundAddr())
	io.Copy(io.Discard, os.Stdin)
	l.Close()
	<-end
}

// cpuTime returns the CPU time that a process has used.
func cpuTime(t *testing.T, pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	var ticks int
	for _, f := range strings.Fields(rest)[11:13] { // utime and stime, in 1/100 s
		var n int
		fmt.Sscan(f, &n)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
