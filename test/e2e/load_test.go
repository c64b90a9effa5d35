package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// Thousands of short connections, and a thousand at a time that end in every way there is, leave
// no descriptor and no goroutine behind. With SLUICE_SOAK it goes on for so long.
func TestMixedEndings(t *testing.T) {
	t.Parallel()
	var soak time.Duration
	if v := os.Getenv("SLUICE_SOAK"); v != "" {
		var err error
		if soak, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	origin, web := tcpOrigin(t, endAsTold), httpOrigin(t, "127.0.0.1")
	hole := newBlackHole(t)

	fresh := startEndings(t, origin, web, hole.addr)
	fresh.warmUp(t)
	before := fresh.s.goroutines(t)
	if len(before) == 0 {
		t.Fatal("a process without goroutines: the dump is not understood")
	}

	e := startEndings(t, origin, web, hole.addr)
	e.warmUp(t)
	for round, end := 0, time.Now().Add(soak); round == 0 || time.Now().Before(end); round++ {
		begun := time.Now()
		e.shortConnections(t, 10000)
		short := time.Since(begun)
		e.mixedEndings(t, 1000)
		t.Logf("round %d: short connections %v, mixed endings %v", round, short, time.Since(begun)-short)
		if t.Failed() {
			return
		}
	}
	e.s.checkIdle(t)
	if after := e.s.goroutines(t); len(after) > len(before) {
		t.Errorf("%d goroutines after the last client, %d in a fresh process:\n%s",
			len(after), len(before), strings.Join(after, "\n\n"))
	}
}

// endings is a sluice whose clients end in all ways.
type endings struct {
	s              *sluice
	forward, proxy string // addresses of sluice
	origin, web    string // of TCP and of HTTP
	hole           string // never answers
}

func startEndings(t *testing.T, origin, web, hole string) *endings {
	t.Helper()
	e := &endings{forward: freeAddr(t), proxy: freeAddr(t), origin: origin, web: web, hole: hole}
	conf := writeFile(t, "sluice.yaml", fmt.Sprintf(`
log:
  level: warn
dial-timeout: 2m
inbounds:
  - type: forward
    listen: %s
    to: %s
  - type: mixed
    listen: %s
`, e.forward, origin, e.proxy))
	e.s = startSluice(t, []string{e.forward, e.proxy}, "run", conf)
	return e
}

// client connects to dst in the i-th way.
func (e *endings) client(i int) (*net.TCPConn, error) {
	switch i % 4 {
	case 0:
		return tryDialThrough("socks5", e.proxy, e.origin)
	case 1:
		return tryDialThrough("connect", e.proxy, e.origin)
	}
	return tryDialThrough("forward", e.forward, e.origin)
}

func (e *endings) warmUp(t *testing.T) {
	t.Helper()
	for i := range 5 {
		if err := e.short(i); err != nil {
			t.Fatal("the first connection: ", err)
		}
	}
}

// endAsTold is an origin that the first byte tells how to end.
func endAsTold(c *net.TCPConn) {
	command := make([]byte, 1)
	if _, err := io.ReadFull(c, command); err != nil {
		return
	}
	switch command[0] {
	case 'e':
		echo(c)
	case 'l':
		lateReply(c)
	case 'c': // reply and close
		io.WriteString(c, "bye")
	case 'r': // reset
		c.SetLinger(0)
	}
}

// short is a connection with one request and one reply. Every fifth is one of plain HTTP.
func (e *endings) short(i int) error {
	if i%5 == 4 {
		c, err := e.get(e.web, "/hello")
		if err != nil {
			return err
		}
		defer c.Close()
		if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "\r\n\r\nhello\n") {
			return fmt.Errorf("plain HTTP: read %q, %w", got, err)
		}
		return nil
	}
	c, err := e.client(i)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * patience))
	if _, err := io.WriteString(c, "e0123456789"); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "0123456789" {
		return fmt.Errorf("read %q, %w", got, err)
	}
	return nil
}

// get sends the proxy a plain HTTP request for the last reply of its connection.
func (e *endings) get(origin, path string) (*net.TCPConn, error) {
	c, err := net.Dial("tcp", e.proxy)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(2 * patience))
	_, err = fmt.Fprintf(c, "GET http://%s%s HTTP/1.1\r\nHost: %[1]s\r\nConnection: close\r\n\r\n", origin, path)
	if err != nil {
		c.Close()
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (e *endings) shortConnections(t *testing.T, n int) {
	var wg sync.WaitGroup
	const workers = 16
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				if err := e.short(i); err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (e *endings) mixedEndings(t *testing.T, n int) {
	var connected, wg sync.WaitGroup
	connected.Add(n)
	for i := range n {
		wg.Go(func() {
			if err := e.end(i, &connected); err != nil {
				t.Errorf("ending %d: %v", i%10, err)
			}
		})
	}
	wg.Wait()
}

// end connects, waits until all others have, and ends in the i-th way.
func (e *endings) end(i int, connected *sync.WaitGroup) error {
	how := i % 10
	switch how {
	case 7, 8, 9: // in plain HTTP
		url := [...][2]string{{e.web, "/endless"}, {e.web, "/aborted-close?n=100000"}, {e.hole, "/"}}[how-7]
		c, err := e.get(url[0], url[1])
		if err == nil && how == 7 {
			_, err = io.ReadFull(c, make([]byte, 100)) // it has begun
		}
		connected.Done()
		if err != nil {
			return err
		}
		defer c.Close()
		connected.Wait()
		if how != 8 { // the client leaves
			c.SetLinger(0)
			return nil
		}
		// On a machine so busy that the answer's beginning is not taken in time, it never comes to an answer: then that is said.
		got, err := io.ReadAll(c)
		if bytes.HasPrefix(got, []byte("HTTP/1.1 502 ")) && bytes.Contains(got, []byte("error=connection_terminated")) {
			return nil
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("an aborted download: %d bytes (%.300q), then %w", len(got), got, err)
		}
		return nil
	case 6: // a client that leaves while the dial goes on
		c, err := net.Dial("tcp", e.proxy)
		if err != nil {
			connected.Done()
			return err
		}
		defer c.Close()
		request := socksRequest(e.hole)
		c.Write(request[:3])
		io.ReadFull(c, make([]byte, 2))
		c.Write(request[3:])
		connected.Done()
		connected.Wait()
		c.(*net.TCPConn).SetLinger(0)
		return nil
	}

	c, err := e.client(i / 10)
	connected.Done()
	if err != nil {
		return err
	}
	defer c.Close()
	connected.Wait()
	c.SetDeadline(time.Now().Add(2 * patience))
	read := func(want string, wantErr error) error {
		got, err := io.ReadAll(c)
		if string(got) != want || !errors.Is(err, wantErr) {
			return fmt.Errorf("read %q, %w", got, err)
		}
		return nil
	}
	switch how {
	case 0: // request and reply, the client ends first
		io.WriteString(c, "eabc")
		c.CloseWrite()
		return read("abc", nil)
	case 1: // the origin ends first
		io.WriteString(c, "c")
		return read("bye", nil)
	case 2: // the reply comes after the client's end
		io.WriteString(c, "l123")
		c.CloseWrite()
		return read(sum(strings.NewReader("123"))+"\n", nil)
	case 3: // the origin resets
		io.WriteString(c, "r")
		return read("", syscall.ECONNRESET)
	case 4: // the client resets
		io.WriteString(c, "eabc")
		c.SetLinger(0)
	case 5: // the client closes, with bytes on their way to it
		io.WriteString(c, "e")
		io.Copy(c, &pattern{left: 100000})
	}
	return nil
}

// At the limit of descriptors sluice waits, without spinning, and goes on when there are some again.
// What goes on is not disturbed.
func TestDescriptorsExhausted(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "prlimit")
	const limit = 48
	origin := tcpOrigin(t, echo)
	addr := freeAddr(t)
	s := startCommand(t, []string{addr}, []string{"prlimit", fmt.Sprintf("--nofile=%d:%[1]d", limit),
		binary, "proxy", addr, "--handshake-timeout", "2m"})
	old := dialThrough(t, "socks5", addr, origin)
	var silent []net.Conn
	for range 2 * limit {
		c, err := net.Dial("tcp", addr) // the kernel takes it, whether sluice does or not
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	proxytest.Until(t, "out of descriptors", func() bool { return len(s.fds()) >= limit-1 })
	proxytest.Until(t, "in the log", func() bool { return strings.Contains(s.log.String(), "paused") })

	const watch = 2 * time.Second
	used := s.cpu(t)
	time.Sleep(watch)
	if used = s.cpu(t) - used; used > watch/4 {
		t.Errorf("sluice has used %v of processor time in %v without descriptors", used, watch)
	}
	old.SetDeadline(time.Now().Add(patience))
	io.WriteString(old, "still here")
	old.CloseWrite()
	if got, err := io.ReadAll(old); err != nil || string(got) != "still here" {
		t.Errorf("a connection from before: %q, %v", got, err)
	}
	for _, c := range silent {
		c.Close()
	}
	fresh := dialThrough(t, "socks5", addr, origin)
	fresh.Close()
	if n := strings.Count(s.log.String(), "paused"); n > 20 {
		t.Errorf("the log says %d times that accepting is paused", n)
	}
}

// Whatever a client says instead of a handshake, it is rid of within the handshake's limit.
func TestBadHandshakes(t *testing.T) {
	t.Parallel()
	addr := freeAddr(t)
	startSluice(t, []string{addr}, "proxy", addr, "--handshake-timeout", "1s")
	for name, text := range map[string]string{
		"nothing":                    "",
		"zeros":                      strings.Repeat("\x00", 1000),
		"0xff":                       strings.Repeat("\xff", 1000),
		"SOCKS4":                     "\x04\x01\x00\x50\x7f\x00\x00\x01user\x00",
		"SOCKS5 without methods":     "\x05\x00",
		"SOCKS5 with unknown ones":   "\x05\x02\x80\x81",
		"SOCKS5 half a greeting":     "\x05\x05\x00",
		"SOCKS5 no request":          "\x05\x01\x00",
		"SOCKS5 wrong version later": "\x05\x01\x00\x04\x01\x00\x01\x7f\x00\x00\x01\x00\x50",
		"SOCKS5 unknown command":     "\x05\x01\x00\x05\x09\x00\x01\x7f\x00\x00\x01\x00\x50",
		"SOCKS5 unknown address":     "\x05\x01\x00\x05\x01\x00\x09\x7f\x00\x00\x01\x00\x50",
		"SOCKS5 name of no length":   "\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50",
		"SOCKS5 half a name":         "\x05\x01\x00\x05\x01\x00\x03\xffabc",
		"HTTP half a line":           "GET http://127",
		"HTTP half a header":         "GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127",
		"HTTP endless line":          "GET http://" + strings.Repeat("a", 2<<20),
		"HTTP endless header":        "GET http://127.0.0.1/ HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", 1<<18),
		"HTTP not a proxy's URL":     "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
		"HTTP bad version":           "GET http://127.0.0.1/ HTTP/9.9\r\n\r\n",
		"CONNECT without a port":     "CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n",
		"CONNECT half":               "CONNECT 127.0.0.1:80 HTTP/1.1\r\n",
		"TLS":                        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("x", 600),
		"PROXY header unasked for":   "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			go io.WriteString(c, text)
			checkRidOf(t, c)
		})
	}
	t.Run("byte by byte", func(t *testing.T) {
		t.Parallel()
		for _, text := range []string{string(socksRequest("127.0.0.1:80")), "CONNECT 127.0.0.1:80 HTTP/1.1\r\n\r\n"} {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var wg sync.WaitGroup
			wg.Go(func() {
				for _, b := range []byte(text) { // each byte well within the limit, all of them not
					time.Sleep(200 * time.Millisecond)
					if _, err := c.Write([]byte{b}); err != nil {
						return
					}
				}
			})
			checkRidOf(t, c)
			c.Close()
			wg.Wait()
		}
	})
}

// checkRidOf waits for sluice to end c, and wants it not to take as long as without the flag.
func checkRidOf(t *testing.T, c net.Conn) {
	t.Helper()
	begun := time.Now()
	c.SetReadDeadline(begun.Add(patience))
	_, err := io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begun) > 8*time.Second {
		t.Errorf("not ended after %v: %v", time.Since(begun), err)
	}
}

// Unix sockets are listened at and connected to like ports.
func TestUnixSockets(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "nc")
	dir, err := os.MkdirTemp("", "s") // the path of a Unix socket is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	origin := tcpOrigin(t, lateReply)
	socket := filepath.Join(dir, "in")
	startSluice(t, []string{"unix://" + socket}, "forward", "unix://"+socket, origin)
	host, port, _ := net.SplitHostPort(forward(t, "unix://"+socket))
	want := sum(strings.NewReader("request")) + "\n"
	checkOutput(t, runProgram(t, strings.NewReader("request"), "nc", "-N", "-U", socket), want)
	checkOutput(t, runProgram(t, strings.NewReader("request"), "nc", "-N", host, port), want)
}
