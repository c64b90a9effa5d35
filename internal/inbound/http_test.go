package inbound

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// hosts dials with net, as the outbound of that name does; scripted errors stand in for hosts
// that cannot be reached.
type hosts map[string]error

func (d hosts) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	if err := d[dst.Host]; err != nil {
		return nil, err
	}
	if dst.Host == "silent.test" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return new(net.Dialer).DialContext(ctx, dst.Network, dst.HostPort())
}

// startHTTP serves s on a free port until the test's end, when nothing may be left of it.
func startHTTP(t *testing.T, s *HTTP, d proxy.Dialer) (addr string, log *logBuffer) {
	t.Helper()
	log = new(logBuffer)
	s.Log = log.logger()
	e := &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: d}, DialTimeout: 2 * time.Second, Log: s.Log}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", log.b.String())
		}
	})
	return serveHTTP(t, s, e, e.Sessions), log
}

func serveHTTP(t *testing.T, s *HTTP, h proxy.Handler, sessions func() int) (addr string) {
	t.Helper()
	proxytest.NoLeaks(t)
	s.Name, s.Addr = "http", loopback
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- s.Serve(context.Background(), h) }()
	t.Cleanup(func() {
		s.Close()
		select {
		case err := <-end:
			if err != nil || sessions() != 0 {
				t.Errorf("Serve: %v, with %d sessions left", err, sessions())
			}
		case <-time.After(10 * time.Second):
			t.Errorf("Serve goes on after Close, with %d sessions", sessions())
		}
	})
	return s.BoundAddr().String()
}

// viaHTTP runs curl with the proxy at addr and returns what it prints. Its -s and -S are set.
func viaHTTP(t *testing.T, addr string, args ...string) string {
	t.Helper()
	out, err := viaHTTPErr(t, addr, args...)
	if err != nil {
		t.Fatalf("curl %q: %v\n%s", args, err, out)
	}
	return out
}

func viaHTTPErr(t *testing.T, addr string, args ...string) (string, error) {
	t.Helper()
	proxytest.Need(t, "curl")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	args = append([]string{"-q", "-sS", "--noproxy", "", "-x", "http://" + addr}, args...)
	out, err := exec.CommandContext(ctx, "curl", args...).CombinedOutput()
	return string(out), err
}

// origin is an HTTP server that answers with what it has been sent.
func origin(t *testing.T) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s|%s|%d %v|%s|%v|%v\n", r.Method, r.RequestURI, r.Proto, r.Host,
			len(body), err, r.TransferEncoding, r.Header, r.Trailer)
	})
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		fmt.Fprintf(w, "%d %x %v", n, sum.Sum(nil), err)
	})
	mux.HandleFunc("/large", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(large))
		io.CopyN(w, proxytest.Pattern(), large)
	})
	mux.HandleFunc("/trailer", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.WriteString(w, "content")
		w.Header().Set("X-Sum", "42")
	})
	mux.HandleFunc("/bare", func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = nil
		io.WriteString(w, "<html>")
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

const large = 100 << 20

func patternSum(n int64) string {
	sum := sha256.New()
	io.CopyN(sum, proxytest.Pattern(), n)
	return fmt.Sprintf("%x", sum.Sum(nil))
}

func TestHTTPWithCurl(t *testing.T) {
	addr, log := startHTTP(t, new(HTTP), hosts(nil))
	o := origin(t)
	t.Run("keep-alive", func(t *testing.T) {
		got := viaHTTP(t, addr, "-w", "%{num_connects} ", "-o", "/dev/null", o.URL+"/1", "-o", "/dev/null", o.URL+"/2", "-o", "/dev/null", o.URL+"/3")
		if got != "1 0 0 " {
			t.Errorf("connects: %s, want one", got)
		}
		proxytest.Until(t, "one session is recorded", func() bool { return log.count("msg=session") == 1 })
	})
	t.Run("plain", func(t *testing.T) {
		got := viaHTTP(t, addr, "-H", "Accept:", "-H", "User-Agent:", "-H", "X-Forwarded-For: me",
			"-H", "Connection: X-Hop", "-H", "X-Hop: 1", "-H", "Keep-Alive: 5", o.URL+"/a%2fb;c/%7e?q=%zz;x&y#f")
		want := fmt.Sprintf("GET /a%%2fb;c/%%7e?q=%%zz;x&y HTTP/1.1|%s|0 <nil>|[]|map[X-Forwarded-For:[me]]|map[]\n", o.Listener.Addr())
		if got != want {
			t.Errorf("the origin got\n%swant\n%s", got, want)
		}
	})
	t.Run("chunked upload", func(t *testing.T) {
		proxytest.Need(t, "sh", "curl")
		out := sh(t, fmt.Sprintf("(echo one; sleep 0.1; echo two) | curl -q -sS -x %s -T - %s/up", addr, o.URL))
		if !strings.HasPrefix(out, "PUT /up ") || !strings.Contains(out, "|8 <nil>|[chunked]|") {
			t.Errorf("the origin got %s", out)
		}
	})
	t.Run("expect", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		os.WriteFile(file, make([]byte, 2<<20), 0o600)
		out := viaHTTP(t, addr, "-i", "--data-binary", "@"+file, o.URL+"/up")
		if !strings.HasPrefix(out, "HTTP/1.1 100 ") || strings.Count(out, " 100 Continue") != 1 || !strings.Contains(out, "|2097152 <nil>|") {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("large", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		viaHTTP(t, addr, "-o", file, o.URL+"/large")
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		sum, want := sha256.New(), patternSum(large)
		if n, err := io.Copy(sum, f); n != large || err != nil || fmt.Sprintf("%x", sum.Sum(nil)) != want {
			t.Errorf("got %d bytes of sum %x, %v", n, sum.Sum(nil), err)
		}
		if out := viaHTTP(t, addr, "-T", file, o.URL+"/sum"); out != fmt.Sprintf("%d %s <nil>", large, want) {
			t.Errorf("the origin got %s", out)
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		if out := viaHTTP(t, addr, "-I", o.URL+"/large"); !strings.Contains(out, fmt.Sprintf("Content-Length: %d\r\n", large)) {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("HTTP/1.0", func(t *testing.T) {
		out := viaHTTP(t, addr, "-i", "--http1.0", "--raw", o.URL+"/trailer")
		if !strings.HasPrefix(out, "HTTP/1.0 200 ") || !strings.HasSuffix(out, "\r\n\r\ncontent") {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("trailer", func(t *testing.T) {
		out := viaHTTP(t, addr, "-i", "--raw", o.URL+"/trailer")
		if !strings.Contains(out, "Trailer: X-Sum\r\n") || !strings.Contains(out, "\r\n0\r\nX-Sum: 42\r\n\r\n") {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("nothing is added", func(t *testing.T) {
		out := viaHTTP(t, addr, "-i", o.URL+"/bare")
		if strings.Contains(out, "Content-Type") || strings.Contains(out, "Via") {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("tunnel", func(t *testing.T) {
		if out := viaHTTP(t, addr, "-p", o.URL+"/x"); !strings.HasPrefix(out, "GET /x HTTP/1.1|") {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("https", func(t *testing.T) {
		cert, _ := proxytest.Certificate(t)
		s := httptest.NewUnstartedServer(o.Config.Handler)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
		s.StartTLS()
		defer s.Close()
		if out := viaHTTP(t, addr, "-k", s.URL+"/x"); !strings.HasPrefix(out, "GET /x HTTP/") {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("python", func(t *testing.T) {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, "file"), []byte("hello"), 0o600)
		port := proxytest.FreePort(t)
		at := fmt.Sprintf("127.0.0.1:%d", port)
		proxytest.Need(t, "python3")
		proxytest.Start(t, at, "python3", "-m", "http.server", "-b", "127.0.0.1", "-d", dir, fmt.Sprint(port))
		if out := viaHTTP(t, addr, "http://"+at+"/file", "http://"+at+"/file"); out != "hellohello" {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("haproxy", func(t *testing.T) {
		at := fmt.Sprintf("127.0.0.1:%d", proxytest.FreePort(t))
		file := filepath.Join(t.TempDir(), "haproxy.cfg")
		os.WriteFile(file, fmt.Appendf(nil, `defaults
	mode http
	timeout client 5s
frontend f
	bind %s
	http-request wait-for-body time 5s if METH_POST
	http-request return status 200 content-type text/plain lf-string "%%HM %%[req.body_len] "
`, at), 0o600)
		proxytest.Need(t, "haproxy")
		proxytest.Start(t, at, "haproxy", "-db", "-f", file)
		if out := viaHTTP(t, addr, "http://"+at+"/", "-d", "data", "http://"+at+"/"); out != "POST 4 POST 4 " {
			t.Errorf("curl got %s", out)
		}
	})
	t.Run("web server", func(t *testing.T) {
		out := viaHTTP(t, addr, "--noproxy", "*", "-i", "http://"+addr+"/")
		if !strings.HasPrefix(out, "HTTP/1.1 400 ") || !strings.Contains(out, "this is an HTTP proxy") {
			t.Errorf("curl got %s", out)
		}
	})
}

func TestHTTPAuth(t *testing.T) {
	addr, log := startHTTP(t, &HTTP{Users: Users{"me": "secret"}}, hosts(nil))
	o := origin(t)
	for _, tt := range []struct{ user, code string }{
		{"", "407"}, {"me:wrong", "407"}, {"you:secret", "407"}, {"me:secret", "200"},
	} {
		for _, how := range []string{"-p", "-L"} { // a tunnel, and nothing
			args := []string{how, "-o", "/dev/null", "-w", "%{http_code} %{http_connect} %header{proxy-authenticate}", o.URL + "/"}
			if tt.user != "" {
				args = append(args, "-U", tt.user)
			}
			out, _ := viaHTTPErr(t, addr, args...)
			if !strings.Contains(out, tt.code) {
				t.Errorf("%s %q: curl got %s", how, tt.user, out)
			}
			if how == "-L" && tt.code == "407" && !strings.Contains(out, "Basic realm=") {
				t.Errorf("%s %q: no challenge: %s", how, tt.user, out)
			}
		}
	}
	if out := viaHTTP(t, addr, "-U", "me:secret", o.URL+"/"); strings.Contains(out, "Proxy-") {
		t.Errorf("the origin got %s", out)
	}
	proxytest.Until(t, "sessions are recorded with their user", func() bool { return log.count("user=me ") == 3 })
	if n := log.count("secret"); n != 0 {
		t.Errorf("the password stands %d times in the log", n)
	}
}

func TestHTTPRefusals(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts{
		"refused.test": syscall.ECONNREFUSED, "unknown.test": &net.DNSError{IsNotFound: true},
		"denied.test": proxy.ErrDenied, "net.test": syscall.ENETUNREACH, "late.test": os.ErrDeadlineExceeded,
		"odd.test": errors.New("odd"),
	})
	for _, tt := range []struct{ host, code, status string }{
		{"refused.test", "502", "connection_refused"}, {"unknown.test", "502", "dns_error"},
		{"denied.test", "403", "http_request_denied"}, {"net.test", "502", "destination_ip_unroutable"},
		{"late.test", "504", "connection_timeout"}, {"odd.test", "502", "proxy_internal_error"},
	} {
		out := viaHTTP(t, addr, "-i", "http://"+tt.host+"/")
		if !strings.HasPrefix(out, "HTTP/1.1 "+tt.code+" ") || !strings.Contains(out, "Proxy-Status: sluice; error="+tt.status+"\r\n") ||
			!strings.Contains(out, "\r\n\r\nsluice: cannot connect to "+tt.host+":80: ") {
			t.Errorf("%s: curl got %s", tt.host, out)
		}
		out, err := viaHTTPErr(t, addr, "-v", "-p", "http://"+tt.host+"/")
		if err == nil || !strings.Contains(out, "HTTP/1.1 "+tt.code+" ") || !strings.Contains(out, "error="+tt.status) {
			t.Errorf("%s through a tunnel: curl got %s", tt.host, out)
		}
	}
	// A refusal must arrive although the client has already sent more.
	c := dialAddr(t, addr)
	fmt.Fprintf(c, "CONNECT refused.test:1 HTTP/1.1\r\n\r\n%s", strings.Repeat("early", 10000))
	if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 502 ") {
		t.Errorf("got %q, %v", got, err)
	}
}

func dialAddr(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(15 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// TestHTTPBadInput checks that what is no request ends in time, by an answer or a close.
func TestHTTPBadInput(t *testing.T) {
	addr, log := startHTTP(t, &HTTP{Listener: Listener{HandshakeTimeout: 300 * time.Millisecond}}, hosts(nil))
	for _, tt := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"half a method", "CONN", ""},
		{"half a CONNECT", "CONNECT a:1 HTTP/1.1\r\nHost:", ""},
		{"half a GET", "GET http://a/ HTTP/1.1\r\nHost:", ""},
		{"CONNECT without a port", "CONNECT a HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		{"CONNECT with content", "CONNECT a:1 HTTP/1.1\r\nContent-Length: 1\r\n\r\n", "HTTP/1.1 400 "},
		{"CONNECT too long", "CONNECT a:1 HTTP/1.1\r\nA: " + strings.Repeat("x", 20<<10), "HTTP/1.1 431 "},
		{"GET too long", "GET http://a/ HTTP/1.1\r\nA: " + strings.Repeat("x", 100<<10) + "\r\n\r\n", "HTTP/1.1 431 "},
		{"GET without a Host", "GET http://a/ HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		{"GET of a path", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 "},
		{"https", "GET https://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 501 "},
		{"ftp", "GET ftp://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 501 "},
		{"no host", "GET http:///x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 "},
		{"bad port", "GET http://a:99999/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 "},
		{"later CONNECT without a port", "GET / HTTP/1.1\r\nHost: a\r\n\r\nCONNECT a HTTP/1.1\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 "},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 "},
		{"TLS", "\x16\x03\x01\x00", ""},
		{"SOCKS5", "\x05\x01\x00", ""},
		{"SOCKS4", "\x04\x01\x00\x50", ""},
		{"garbage", "\x00\xff\xfe", ""},
		{"words", "hello\r\n\r\n", "HTTP/1.1 400 "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialAddr(t, addr)
			io.WriteString(c, tt.in)
			got, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(got), tt.want) || tt.want == "" && len(got) > 0 {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
	t.Run("byte by byte", func(t *testing.T) {
		c := dialAddr(t, addr)
		go func() {
			for range 2000 {
				if _, err := c.Write([]byte("A")); err != nil {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}()
		if n, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("not closed: %d, %v", n, err)
		}
	})
	for _, hint := range []string{"speaks SOCKS5", "speaks SOCKS4", "speaks TLS"} {
		if log.count(hint) != 1 {
			t.Errorf("the log does not say %q", hint)
		}
	}
}

// TestHTTPTunnel checks early data, half-close and reset through a CONNECT, as the first
// request of a conn and after a plain one.
func TestHTTPTunnel(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	web := origin(t)
	echo := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(b []byte) []byte { return b }))
	abort := proxytest.Listen(t, "tcp", func(c net.Conn) {
		io.ReadFull(c, make([]byte, 3))
		io.WriteString(c, "last words")
		reset(c)
	})
	for _, plainFirst := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain first %v", plainFirst), func(t *testing.T) {
			connect := func(to string) (*net.TCPConn, *bufio.Reader) {
				c := dialAddr(t, addr)
				r := bufio.NewReader(c)
				if plainFirst {
					fmt.Fprintf(c, "GET %s/x HTTP/1.1\r\nHost: x\r\n\r\n", web.URL)
					resp, err := http.ReadResponse(r, nil)
					if err != nil {
						t.Fatal(err)
					}
					io.Copy(io.Discard, resp.Body)
				}
				fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\nearly, ", to)
				resp, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
				if err != nil || resp.StatusCode != 200 {
					t.Fatalf("got %v, %v", resp, err)
				}
				return c, r
			}
			c, r := connect(echo.Addr.HostPort())
			io.WriteString(c, "late")
			c.CloseWrite()
			if got, err := io.ReadAll(r); err != nil || string(got) != "early, late" {
				t.Errorf("got %q, %v", got, err)
			}
			_, r = connect(abort.Addr.HostPort())
			if got, err := io.ReadAll(r); !errors.Is(err, syscall.ECONNRESET) || string(got) != "last words" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// sh runs a shell's command and returns what it prints.
func sh(t *testing.T, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}
