package e2e

import (
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// streamWays are the ways of a client that speaks no HTTP, with what netcat calls them.
var streamWays = []struct {
	name  string
	flags []string // of nc; the proxy's address goes after the last
}{
	{"direct", nil},
	{"forward", nil},
	{"socks5", []string{"-X", "5", "-x"}},
	{"connect", []string{"-X", "connect", "-x"}},
}

// netcat returns the arguments of nc for one of streamWays to origin, and starts the sluice for it.
func netcat(t *testing.T, way int, origin string) []string {
	t.Helper()
	w := streamWays[way]
	args := slices.Clone(w.flags)
	switch w.name {
	case "direct":
	case "forward":
		origin = forward(t, origin)
	default:
		args = append(args, proxy(t))
	}
	host, port, err := net.SplitHostPort(origin)
	if err != nil {
		t.Fatal(err)
	}
	return append(args, host, port)
}

// A client that sends its request and then its end still gets the reply, however late.
func TestNetcatHalfCloses(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "nc")
	origin := tcpOrigin(t, lateReply)
	for i, way := range streamWays {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			args := netcat(t, i, origin)
			for _, size := range []int64{0, 1, 3 << 20} {
				r := runProgram(t, &pattern{left: size}, "nc", append([]string{"-N"}, args...)...)
				checkOutput(t, r, sum(&pattern{left: size})+"\n")
			}
		})
	}
}

// An origin that ends first still gets what the client has to say, however late.
func TestNetcatOriginHalfCloses(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "nc")
	for _, way := range []string{"forward", "socks5", "connect"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			addr := freeAddr(t)
			host, port, _ := net.SplitHostPort(addr)
			var listen string // where the client connects to
			if way == "forward" {
				listen = forward(t, addr)
			} else {
				listen = proxy(t)
			}
			origin := startServer(t, addr, "sh", "-c", "printf hello | exec nc -N -l "+host+" "+port)
			c := dialThrough(t, way, listen, addr)
			if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
				t.Fatalf("read %q, %v", got, err)
			}
			time.Sleep(200 * time.Millisecond)
			if _, err := io.Copy(c, &pattern{left: 3 << 20}); err != nil {
				t.Fatal(err)
			}
			c.Close()
			if code := origin.exitCode(t, patience); code != 0 {
				t.Errorf("nc -l ended with code %d", code)
			}
			if sum(strings.NewReader(origin.log.String())) != sum(&pattern{left: 3 << 20}) {
				t.Errorf("nc -l got %d bytes, and not those that were sent", len(origin.log.String()))
			}
		})
	}
}

// dialThrough connects to dst by way of the sluice at addr, and fails the test where that fails.
func dialThrough(t *testing.T, way, addr, dst string) *net.TCPConn {
	t.Helper()
	c, err := tryDialThrough(way, addr, dst)
	if err != nil {
		t.Fatalf("%s through %s: %v", way, addr, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A reset arrives as a reset, from either side, after all bytes that went before it.
func TestReset(t *testing.T) {
	t.Parallel()
	const size = 300 << 10
	ended := make(chan error, 10)
	origin := tcpOrigin(t, func(c *net.TCPConn) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil {
			ended <- err
			return
		}
		if first[0] == 'r' { // reset me
			io.Copy(c, &pattern{left: size})
			drained(c)
			c.SetLinger(0)
			return
		}
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	for _, way := range []string{"direct", "forward", "socks5", "connect"} {
		t.Run(way, func(t *testing.T) {
			var addr string
			switch way {
			case "direct":
			case "forward":
				addr = forward(t, origin)
			default:
				addr = proxy(t)
			}

			c := dialThrough(t, way, addr, origin)
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, "r")
			got, err := io.ReadAll(c)
			if len(got) != size || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("from the origin: %d bytes, then %v", len(got), err)
			}

			c = dialThrough(t, way, addr, origin)
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, "some bytes")
			drained(c)
			c.SetLinger(0)
			c.Close()
			select {
			case err := <-ended:
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("from the client: the origin saw %v", err)
				}
			case <-time.After(patience):
				t.Error("from the client: the origin has seen nothing of the reset")
			}
		})
	}
}

func TestOpenSSL(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	addr := freeAddr(t)
	startServer(t, addr, "openssl", "s_server", "-accept", addr, "-cert", cert, "-key", key, "-www", "-quiet")
	client := []string{"s_client", "-quiet", "-verify_return_error", "-CAfile", cert, "-verify_hostname", "localhost"}
	for way, args := range map[string][]string{
		"forward": {"-connect", forward(t, addr)},
		"connect": {"-connect", addr, "-proxy", proxy(t)},
	} {
		r := runProgram(t, strings.NewReader("GET / HTTP/1.0\r\n\r\n"), "openssl", append(client, args...)...)
		if !strings.HasPrefix(r.stdout, "HTTP/1.0 200 ok\r\n") || !strings.Contains(r.stdout, "</BODY></HTML>") {
			t.Errorf("%s: openssl ended with code %d and printed %q\n%s", way, r.code, tail(r.stdout, 500), r.stderr)
		}
	}
	for _, way := range []string{"socks5", "connect"} { // https through a proxy
		b := browserVia(t, way, proxy(t), "localhost")
		r := b.curl(t, "--cacert", cert, "--connect-to", "::"+addr, "https://localhost/")
		if r.code != 0 || !strings.Contains(r.stdout, "</BODY></HTML>") {
			t.Errorf("https by %s: %+v", way, r)
		}
	}
}

func TestPythonOrigin(t *testing.T) {
	t.Parallel()
	content := strings.Repeat("a line of the file\n", 50000)
	dir := t.TempDir()
	writeIn(t, dir, "file.txt", content)
	addr := freeAddr(t)
	host, port, _ := net.SplitHostPort(addr)
	startServer(t, addr, "python3", "-m", "http.server", port, "--bind", host, "--directory", dir)
	eachWay(t, addr, func(t *testing.T, b browser) { // HTTP/1.0, which ends with the connection
		b.expect(t, content, b.url+"/file.txt")
		b.expect(t, content, "--http1.0", b.url+"/file.txt")
	})
}
