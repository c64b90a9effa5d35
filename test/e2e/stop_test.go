package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// A stop lets what goes on come to its end, takes nothing new, and is a success.
func TestStopGracefully(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	addr := freeAddr(t)
	s := startSluice(t, []string{addr}, "forward", addr, origin)
	download := start(t, "curl", "-q", "-sS", "http://"+addr+"/slow?n=100000")
	proxytest.Until(t, "downloading", func() bool { return download.log.String() != "" })

	s.cmd.Process.Signal(syscall.SIGTERM)
	proxytest.Until(t, "refusing new clients", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if code := download.exitCode(t, patience); code != 0 || len(download.log.String()) != 100000 {
		t.Errorf("the download ended with code %d after %d bytes", code, len(download.log.String()))
	}
	if code := s.exitCode(t, patience); code != 0 {
		t.Errorf("sluice ended with code %d", code)
	}
}

// A stop aborts what has not come to its end within the grace, and says how much that was.
func TestStopAborts(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	addr := freeAddr(t)
	s := startSluice(t, []string{addr}, "proxy", addr, "--grace", "500ms")
	var downloads []*process
	for _, way := range []string{"socks5", "connect", "http"} {
		b := browserVia(t, way, addr, origin)
		d := start(t, "curl", b.command([]string{b.url + "/endless"})...)
		proxytest.Until(t, "downloading", func() bool { return d.log.String() != "" })
		downloads = append(downloads, d)
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	for _, d := range downloads {
		if code := d.exitCode(t, patience); code != 18 && code != 56 {
			t.Errorf("a download ended with code %d", code)
		}
	}
	s.exitCode(t, patience)
	if log := s.log.String(); !strings.Contains(log, "aborted 3 sessions") {
		t.Errorf("the log does not say how many sessions were aborted:\n%s", log)
	}
}

// A port in use is an error that names who has it.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", freeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	addr := ln.Addr().String()
	for _, args := range [][]string{{"forward", addr, "127.0.0.1:80"}, {"proxy", addr}} {
		r := runProgram(t, nil, binary, args...)
		for _, want := range []string{addr, "in use", fmt.Sprintf("pid %d", os.Getpid())} {
			if r.code != 1 || !strings.Contains(r.stderr, want) {
				t.Errorf("%s: ended with code %d, and without saying %q: %s", args[0], r.code, want, r.stderr)
			}
		}
	}
}

// A client that resets its connection while the dial goes on ends the dial.
func TestAbandonedDial(t *testing.T) {
	t.Parallel()
	hole := newBlackHole(t)
	for _, way := range []string{"forward", "socks5", "connect"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			addr, c := askFor(t, way, hole.addr)
			proxytest.Until(t, "dialing", func() bool { return isDialing(hole.addr) })
			c.SetLinger(0)
			c.Close()
			addr.checkIdle(t) // long before the dial's limit
		})
	}
}

// A client that has said all it has to say while the dial goes on still gets its answer.
func TestHalfCloseDuringDial(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"forward", "socks5"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			hole := newBlackHole(t)
			_, c := askFor(t, way, hole.addr)
			proxytest.Until(t, "dialing", func() bool { return isDialing(hole.addr) })
			c.Write([]byte("request"))
			c.CloseWrite()
			time.Sleep(100 * time.Millisecond)
			o := hole.open(t)
			defer o.Close()
			o.SetDeadline(time.Now().Add(patience))
			lateReply(o)
			o.Close()
			c.SetDeadline(time.Now().Add(patience))
			if way == "socks5" {
				var reply [10]byte
				if _, err := c.Read(reply[:]); err != nil || reply[1] != 0 {
					t.Fatalf("reply % x, %v", reply, err)
				}
			}
			want := sum(strings.NewReader("request")) + "\n"
			var got strings.Builder
			if _, err := c.WriteTo(&got); err != nil || got.String() != want {
				t.Errorf("read %q, %v; want %q", got.String(), err, want)
			}
		})
	}
}

// askFor starts sluice, and has a client ask it for dst. It does not wait for the answer.
func askFor(t *testing.T, way, dst string) (*sluice, *net.TCPConn) {
	t.Helper()
	addr := freeAddr(t)
	args := []string{"proxy", addr, "--dial-timeout", "2m"}
	if way == "forward" {
		args = []string{"forward", addr, dst, "--dial-timeout", "2m"}
	}
	s := startSluice(t, []string{addr}, args...)
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	switch way {
	case "socks5":
		request := socksRequest(dst)
		var method [2]byte
		nc.Write(request[:3])
		if _, err := nc.Read(method[:]); err != nil {
			t.Fatal(err)
		}
		nc.Write(request[3:])
	case "connect":
		fmt.Fprintf(nc, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", dst)
	}
	return s, nc.(*net.TCPConn)
}
