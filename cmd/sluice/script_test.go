package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sluice": main})
}

// TestScripts runs testdata/*.txt. They drive the program as a user does, with these commands beside
// testscript's own:
//
//	origin NAME           starts an HTTP origin and sets $NAME to its address; /bytes/N there is N bytes
//	echo-origin NAME      the same, of an origin that sends back what it gets
//	free-port NAME        sets $NAME to an address of loopback where nobody listens
//	closing-relay NAME TO starts a relay to TO that closes both sides when one ends, and sets $NAME to its address
//	start NAME ARG...     starts sluice with ARG..., waits until it listens, and sets $NAME to its first
//	                      address, $NAME_2 to its second; it writes to the files NAME.out and NAME.err
//	signal NAME TERM|INT  sends it a signal
//	ended NAME CODE       waits for its end, which must come with that exit code
//	await FILE REGEXP     waits until the file has a line that matches
//	session NAME ADDR     opens a session through a sluice at ADDR to an echo origin
//	finish NAME           half-closes the session; its end must be clean
//	broken NAME           waits for the session's end, which must be a reset
func TestScripts(t *testing.T) {
	proxytest.Need(t, "curl")
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			s := &script{sluices: map[string]*sluice{}, sessions: map[string]*net.TCPConn{}}
			env.Values["script"] = s
			env.Setenv("GORACE", quickExit)
			env.Defer(s.cleanUp)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"origin":        httpOrigin,
			"echo-origin":   echoOrigin,
			"free-port":     freePort,
			"closing-relay": closingRelay,
			"start":         startSluice,
			"signal":        signalSluice,
			"ended":         endedSluice,
			"await":         awaitLine,
			"session":       openSession,
			"finish":        finishSession,
			"broken":        brokenSession,
		},
	})
}

// quickExit keeps programs that were built with the race detector from sleeping for a second at their end.
const quickExit = "atexit_sleep_ms=0"

// script is what a running script has started.
type script struct {
	sluices  map[string]*sluice
	sessions map[string]*net.TCPConn
	closers  []io.Closer
}

func scriptOf(ts *testscript.TestScript) *script { return ts.Value("script").(*script) }

func (s *script) cleanUp() {
	for _, c := range s.sessions {
		c.Close()
	}
	for _, p := range s.sluices {
		p.cmd.Process.Kill()
		<-p.ended
	}
	for _, c := range s.closers {
		c.Close()
	}
}

// sluice is a process.
type sluice struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has been waited for
}

func (p *sluice) wait() {
	p.cmd.Wait()
	close(p.ended)
}

func check(ts *testscript.TestScript, neg bool, args []string, least int, usage string) {
	if neg || len(args) < least {
		ts.Fatalf("usage: %s", usage)
	}
}

func httpOrigin(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 1, "origin NAME")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/bytes/")); err == nil {
			io.Copy(io.Discard, r.Body)
			w.Write(make([]byte, n))
			return
		}
		fmt.Fprintf(w, "%s says hello to %s\n", args[0], r.URL.Path)
	})}
	go server.Serve(ln)
	scriptOf(ts).closers = append(scriptOf(ts).closers, server)
	ts.Setenv(args[0], ln.Addr().String())
}

func echoOrigin(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 1, "echo-origin NAME")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	go serveEcho(ln)
	scriptOf(ts).closers = append(scriptOf(ts).closers, ln)
	ts.Setenv(args[0], ln.Addr().String())
}

func freePort(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 1, "free-port NAME")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Check(ln.Close())
	ts.Setenv(args[0], ln.Addr().String())
}

func closingRelay(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "closing-relay NAME TO")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	go serveClosing(ln, args[1])
	scriptOf(ts).closers = append(scriptOf(ts).closers, ln)
	ts.Setenv(args[0], ln.Addr().String())
}

func serveClosing(ln net.Listener, to string) {
	for {
		client, err := ln.Accept()
		if err != nil {
			return
		}
		origin, err := net.Dial("tcp", to)
		if err != nil {
			client.Close()
			continue
		}
		go copyAndClose(client, origin)
		go copyAndClose(origin, client)
	}
}

func copyAndClose(a, b net.Conn) {
	io.Copy(a, b)
	a.Close()
	b.Close()
}

func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go echo(c)
	}
}

func echo(c net.Conn) {
	proxytest.Echo(c)
	c.Close()
}

// listening finds the addresses that sluice has said it listens at.
var listening = regexp.MustCompile(`(?m)^(?:.* proxy on|Forwarding|.* msg=listening .*addr=) ?([^\s"]+)`)

func startSluice(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "start NAME ARG...")
	name := args[0]
	p := &sluice{cmd: exec.Command("sluice", args[1:]...), ended: make(chan struct{})}
	p.cmd.Dir = ts.MkAbs(".")
	p.cmd.Env = append(os.Environ(), "GORACE="+quickExit)
	out, err := os.Create(ts.MkAbs(name + ".out"))
	ts.Check(err)
	defer out.Close()
	errOut, err := os.Create(ts.MkAbs(name + ".err"))
	ts.Check(err)
	defer errOut.Close()
	p.cmd.Stdout, p.cmd.Stderr = out, errOut
	ts.Check(p.cmd.Start())
	go p.wait()
	scriptOf(ts).sluices[name] = p

	var found [][][]byte
	until(ts, "sluice listens", func() bool {
		found = listening.FindAllSubmatch([]byte(output(ts, name)), -1)
		select {
		case <-p.ended:
			ts.Fatalf("sluice ended with %v:\n%s", p.cmd.ProcessState, output(ts, name))
		default:
		}
		return len(found) > 0
	})
	for i, f := range found {
		key := name
		if i > 0 {
			key = fmt.Sprintf("%s_%d", name, i+1)
		}
		ts.Setenv(key, string(bytes.TrimSuffix(f[1], []byte(","))))
	}
}

// output returns what a sluice has written so far.
func output(ts *testscript.TestScript, name string) string {
	return ts.ReadFile(name+".out") + ts.ReadFile(name+".err")
}

func signalSluice(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "signal NAME TERM|INT")
	sig, ok := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT}[args[1]]
	if !ok {
		ts.Fatalf("unknown signal %s", args[1])
	}
	ts.Check(scriptOf(ts).sluices[args[0]].cmd.Process.Signal(sig))
}

func endedSluice(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "ended NAME CODE")
	p := scriptOf(ts).sluices[args[0]]
	select {
	case <-p.ended:
	case <-time.After(proxytest.Patience):
		ts.Fatalf("%s has not ended:\n%s", args[0], output(ts, args[0]))
	}
	if got := strconv.Itoa(p.cmd.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("%s ended with code %s:\n%s", args[0], got, output(ts, args[0]))
	}
}

func awaitLine(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "await FILE REGEXP")
	re := regexp.MustCompile("(?m)" + strings.Join(args[1:], " "))
	until(ts, "a line "+re.String()+" in "+filepath.Base(args[0]), func() bool {
		return re.MatchString(ts.ReadFile(args[0]))
	})
}

func openSession(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 2, "session NAME ADDR")
	c, err := net.DialTimeout("tcp", args[1], proxytest.Patience)
	ts.Check(err)
	scriptOf(ts).sessions[args[0]] = c.(*net.TCPConn)
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	_, err = c.Write([]byte("x"))
	ts.Check(err)
	_, err = io.ReadFull(c, make([]byte, 1)) // it is relayed now
	ts.Check(err)
}

func finishSession(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 1, "finish NAME")
	c := scriptOf(ts).sessions[args[0]]
	_, err := c.Write([]byte("last words"))
	ts.Check(err)
	ts.Check(c.CloseWrite())
	got, err := io.ReadAll(c)
	ts.Check(err)
	if string(got) != "last words" {
		ts.Fatalf("the session ended with %q", got)
	}
}

func brokenSession(ts *testscript.TestScript, neg bool, args []string) {
	check(ts, neg, args, 1, "broken NAME")
	if !proxytest.Resets(scriptOf(ts).sessions[args[0]]) {
		ts.Fatalf("the session ended, but not by a reset")
	}
}

func until(ts *testscript.TestScript, what string, cond func() bool) {
	for deadline := time.Now().Add(proxytest.Patience); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("waited in vain: %s", what)
		}
	}
}
