package e2e

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// ways are the ways of an HTTP client to its origin. The first is without sluice: it proves that
// what a test expects is what happens without a relay.
var ways = []string{"direct", "forward", "socks5", "socks5h", "connect", "http"}

// browser is curl, set up for one of the ways.
type browser struct {
	way  string
	args []string
	url  string // of the origin, without a path
}

// newBrowser starts the sluice that way needs, with flags. origin is host:port.
func newBrowser(t *testing.T, way, origin string, flags ...string) browser {
	t.Helper()
	switch way {
	case "direct":
		return browser{way, []string{"--noproxy", "*"}, "http://" + origin}
	case "forward":
		return browser{way, []string{"--noproxy", "*"}, "http://" + forward(t, origin, flags...)}
	}
	return browserVia(t, way, proxy(t, flags...), origin)
}

// browserVia is newBrowser for a proxy that runs already.
func browserVia(t *testing.T, way, proxy, origin string) browser {
	t.Helper()
	args := map[string][]string{
		"socks5":  {"--socks5", proxy},
		"socks5h": {"--socks5-hostname", proxy},
		"connect": {"--proxytunnel", "--proxy", "http://" + proxy},
		"http":    {"--proxy", "http://" + proxy},
	}[way]
	if args == nil {
		t.Fatalf("unknown way %q", way)
	}
	return browser{way, args, "http://" + origin}
}

// curl's own arguments: no .curlrc, no progress, but errors.
func (b browser) command(args []string) []string {
	return slices.Concat([]string{"-q", "-sS", "--max-time", "55"}, b.args, args)
}

func (b browser) curl(t *testing.T, args ...string) result {
	t.Helper()
	return runProgram(t, nil, "curl", b.command(args)...)
}

// send is curl with a body on its standard input.
func (b browser) send(t *testing.T, body io.Reader, args ...string) result {
	t.Helper()
	return runProgram(t, body, "curl", b.command(args)...)
}

// expect is curl with a successful end and this output.
func (b browser) expect(t *testing.T, want string, args ...string) {
	t.Helper()
	checkOutput(t, b.curl(t, args...), want)
}

func checkOutput(t *testing.T, r result, want string) {
	t.Helper()
	if r.code != 0 || r.stdout != want {
		t.Errorf("ended with code %d and printed %q, want %q\n%s", r.code, tail(r.stdout, 500), want, r.stderr)
	}
}

// eachWay runs f for each way to origin, in parallel.
func eachWay(t *testing.T, origin string, f func(t *testing.T, b browser)) {
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			f(t, newBrowser(t, way, origin))
		})
	}
}

func TestCurl(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("what a body ", 100000)
	bodySum := sum(strings.NewReader(body)) + "\n"
	var parts strings.Builder
	for i := range 20 {
		fmt.Fprintf(&parts, "part %d\n", i)
	}
	eachWay(t, httpOrigin(t, "127.0.0.1"), func(t *testing.T, b browser) {
		b.expect(t, "hello\n", b.url+"/hello")
		b.expect(t, "hello\n", "--http1.0", b.url+"/hello")
		b.expect(t, parts.String(), b.url+"/chunked")
		b.expect(t, "404", "-o", "/dev/null", "-w", "%{http_code}", b.url+"/missing")
		checkOutput(t, b.send(t, strings.NewReader(body), "--data-binary", "@-", b.url+"/sum"), bodySum)
		checkOutput(t, b.send(t, strings.NewReader(body), "-H", "Expect:", "--data-binary", "@-", b.url+"/sum"), bodySum)
		checkOutput(t, b.send(t, strings.NewReader(body), "-T", "-", b.url+"/sum"), bodySum) // chunked
		if r := b.curl(t, "--head", b.url+"/bytes?n=12345"); r.code != 0 || !strings.Contains(r.stdout, "Content-Length: 12345\r\n") {
			t.Errorf("HEAD: %+v", r)
		}
		// Three requests over one connection.
		b.expect(t, "hello\n1 hello\n0 hello\n0 ", "-w", "%{num_connects} ", b.url+"/hello", b.url+"/hello", b.url+"/hello")
		// The origin sees what it would see from curl itself.
		b.expect(t, "GET /request HTTP/1.1 host="+strings.TrimPrefix(b.url, "http://")+` proxy-connection=""`+"\n", b.url+"/request")
	})
}

// Large bodies arrive whole in both directions.
func TestCurlLarge(t *testing.T) {
	t.Parallel()
	const size = 200 << 20
	want := sum(&pattern{left: size})
	zeros := filepath.Join(t.TempDir(), "zeros") // has no blocks on the disk
	if err := os.WriteFile(zeros, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(zeros, size); err != nil {
		t.Fatal(err)
	}
	zerosSum := sum(io.LimitReader(zeroReader{}, size)) + "\n"
	eachWay(t, httpOrigin(t, "127.0.0.1"), func(t *testing.T, b browser) {
		if b.way == "direct" || b.way == "socks5h" { // nothing new
			return
		}
		h := sha256.New()
		r := runInto(t, h, nil, "curl", b.command([]string{fmt.Sprintf("%s/bytes?n=%d", b.url, size)})...)
		if got := hex.EncodeToString(h.Sum(nil)); r.code != 0 || got != want {
			t.Errorf("download: code %d, hash %s, want %s\n%s", r.code, got, want, r.stderr)
		}
		checkOutput(t, b.send(t, &pattern{left: size}, "-T", "-", b.url+"/sum"), want+"\n") // chunked
		b.expect(t, zerosSum, "-T", zeros, b.url+"/sum")                                    // with its length
	})
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Names are resolved at the proxy: to an address that answers, where only one of several does.
func TestCurlByName(t *testing.T) {
	t.Parallel()
	origin := strings.Replace(httpOrigin(t, "127.0.0.1"), "127.0.0.1", "localhost", 1)
	addr := proxy(t)
	for _, way := range []string{"socks5h", "connect", "http"} {
		b := browserVia(t, way, addr, origin)
		b.expect(t, "hello\n", b.url+"/hello")
	}
	b := newBrowser(t, "forward", origin)
	b.expect(t, "hello\n", b.url+"/hello")
}

func TestCurlIPv6(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "::1")
	eachWay(t, origin, func(t *testing.T, b browser) {
		b.expect(t, "hello\n", "-g", b.url+"/hello")
	})
}

// A proxy with users lets in who knows a password, and nobody else.
func TestCurlUsers(t *testing.T) {
	t.Parallel()
	origin := httpOrigin(t, "127.0.0.1")
	addr := proxy(t, "--users-file", writeFile(t, "users", "alice:correct horse\nbob:b\n"))
	for _, way := range []string{"socks5", "socks5h", "connect", "http"} {
		b := browserVia(t, way, addr, origin)
		b.expect(t, "hello\n", "--proxy-user", "alice:correct horse", b.url+"/hello")
		b.expect(t, "hello\n", "--proxy-user", "bob:b", b.url+"/hello")
		for _, user := range []string{"alice:b", "bob:", "eve:b"} {
			r := b.curl(t, "--fail", "--proxy-user", user, b.url+"/hello")
			if r.code == 0 || strings.Contains(r.stdout, "hello") {
				t.Errorf("%s: %s was let in", way, user)
			}
		}
		if r := b.curl(t, "--fail", b.url+"/hello"); r.code == 0 || strings.Contains(r.stdout, "hello") {
			t.Errorf("%s: a client without a name was let in", way)
		}
	}
	b := browserVia(t, "http", addr, origin)
	b.expect(t, "407", "-o", "/dev/null", "-w", "%{http_code}", b.url+"/hello")
	b = browserVia(t, "connect", addr, origin)
	if r := b.curl(t, "-o", "/dev/null", "-w", "%{http_connect}", b.url+"/hello"); r.stdout != "407" {
		t.Errorf("CONNECT without a name: %+v", r)
	}
}

// A transfer that the origin aborts fails at the client: it does not look complete, and what was
// sent before the abort is there.
func TestCurlAborted(t *testing.T) {
	t.Parallel()
	eachWay(t, httpOrigin(t, "127.0.0.1"), func(t *testing.T, b browser) {
		const n = 1 << 20
		for path, got := range map[string]int64{"/aborted": n / 2, "/aborted-chunked": n / 2, "/aborted-close": n} {
			h := sha256.New()
			r := runInto(t, h, nil, "curl", b.command([]string{fmt.Sprintf("%s%s?n=%d", b.url, path, n)})...)
			if r.code != 18 && r.code != 56 { // partial file; failure in receiving
				t.Errorf("%s: curl ended with code %d: %s", path, r.code, r.stderr)
			}
			if hex.EncodeToString(h.Sum(nil)) != sum(&pattern{left: got}) {
				t.Errorf("%s: not all that was sent before the abort has arrived", path)
			}
		}
	})
}

// An upload whose client dies does not look complete to the origin.
func TestCurlKilled(t *testing.T) {
	t.Parallel()
	ended := make(chan error, len(ways))
	begun := make(chan struct{}, len(ways))
	origin := httpOriginOf(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadFull(r.Body, make([]byte, 1000))
		begun <- struct{}{}
		if err == nil {
			_, err = io.Copy(io.Discard, r.Body)
		}
		ended <- err
	})
	for _, way := range ways {
		b := newBrowser(t, way, origin)
		zeros, err := os.Open("/dev/zero")
		if err != nil {
			t.Fatal(err)
		}
		curl := startWith(t, zeros, "curl", b.command([]string{"--limit-rate", "1M", "-T", "-", b.url})...)
		zeros.Close()
		select {
		case <-begun:
		case <-time.After(patience):
			t.Fatalf("%s: no upload has begun: %s", way, curl.log)
		}
		curl.cmd.Process.Kill()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: the origin takes half an upload for a whole one", way)
			}
		case <-time.After(patience):
			t.Errorf("%s: the origin does not know that its client is gone", way)
		}
	}
}

// A connection that is upgraded carries what it wants, and ends in any way.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	origin := httpOriginOf(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		c, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
		io.Copy(c, io.MultiReader(io.LimitReader(buffered, int64(buffered.Reader.Buffered())), c))
	})
	c, err := net.Dial("tcp", proxy(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: %[1]s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", origin)
	in := bufio.NewReader(c)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != "echo" {
		t.Fatalf("%+v, %v", resp, err)
	}
	io.WriteString(c, "any bytes")
	c.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(in); err != nil || string(got) != "any bytes" {
		t.Errorf("read %q, %v", got, err)
	}
}

// An origin that refuses the connection is refused to the client, as its protocol can say it.
func TestCurlRefused(t *testing.T) {
	t.Parallel()
	origin := refusedAddr(t)
	for _, tt := range []struct {
		way   string
		codes []int  // of curl
		says  string // on standard error or output
	}{
		{"direct", []int{7}, "connect"},
		{"forward", []int{7, 55, 56}, "curl: ("}, // 7: the reset was quicker than curl
		{"socks5", []int{97}, "(5)"},             // RFC 1928: connection refused
		{"socks5h", []int{97}, "(5)"},
		{"connect", []int{7, 56}, "502"},
		{"http", []int{0}, "502"},
	} {
		t.Run(tt.way, func(t *testing.T) {
			t.Parallel()
			b := newBrowser(t, tt.way, origin)
			r := b.curl(t, "-o", "/dev/null", "-w", "%{http_code}", b.url+"/hello")
			if !slices.Contains(tt.codes, r.code) || !strings.Contains(r.stdout+r.stderr, tt.says) {
				t.Errorf("%+v", r)
			}
		})
	}
}

// An origin that does not answer at all ends the dial within its limit.
func TestCurlBlackHole(t *testing.T) {
	t.Parallel()
	hole := newBlackHole(t)
	for _, tt := range []struct {
		way   string
		codes []int
		says  string
	}{
		{"forward", []int{55, 56}, "reset"},
		{"socks5", []int{97}, "("},
		{"connect", []int{56}, "504"},
		{"http", []int{0}, "504"},
	} {
		t.Run(tt.way, func(t *testing.T) {
			t.Parallel()
			b := newBrowser(t, tt.way, hole.addr, "--dial-timeout", "1s")
			r := b.curl(t, "--max-time", "20", "-o", "/dev/null", "-w", "%{http_code}", b.url+"/hello")
			if !slices.Contains(tt.codes, r.code) || !strings.Contains(r.stdout+r.stderr, tt.says) {
				t.Errorf("%+v", r)
			}
		})
	}
}
