package inbound

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// serveSOCKS5 runs s on a free port of loopback until the test's end.
func serveSOCKS5(t *testing.T, s *SOCKS5, h proxy.Handler) proxy.Addr {
	t.Helper()
	s.Name, s.Addr = "in", loopback
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- s.Serve(context.Background(), h) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-end; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	a := s.BoundAddr().(*net.TCPAddr)
	return proxy.TCP(a.IP.String(), uint16(a.Port))
}

const (
	socks5Greeting = "\x05\x01\x00"
	socks5Login    = "\x05\x01\x02" + "\x01\x03ann\x06secret"
	socks5Request  = "\x05\x01\x00\x03\x0bexample.com\x01\xbb"
	socks5Yes      = "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
)

// socks5No is the reply of this code.
func socks5No(code byte) string { return "\x05" + string(code) + "\x00\x01\x00\x00\x00\x00\x00\x00" }

// say writes in, ends it, and returns all that comes back. A reset is an error.
func say(t *testing.T, a proxy.Addr, in string) string {
	t.Helper()
	c := proxytest.Dial(t, a)
	if _, err := io.WriteString(c, in); err != nil {
		t.Fatal(err)
	}
	c.(*net.TCPConn).CloseWrite()
	out, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("after %q: %v", out, err)
	}
	c.Close()
	return string(out)
}

func TestSOCKS5HandsOver(t *testing.T) {
	const early = "sent right behind the request"
	tests := []struct {
		name string
		s    *SOCKS5
		in   string
		told string
		user string
	}{
		{"without authentication", &SOCKS5{}, socks5Greeting + socks5Request, "\x05\x00" + socks5Yes, ""},
		{"password that nobody asked for", &SOCKS5{}, socks5Login + socks5Request, "\x05\x02\x01\x00" + socks5Yes, ""},
		{"password", &SOCKS5{Users: Users{"ann": "secret"}}, socks5Login + socks5Request, "\x05\x02\x01\x00" + socks5Yes, "ann"},
		{"behind a PROXY header", &SOCKS5{Listener: Listener{AcceptProxy: true}},
			"PROXY TCP4 192.0.2.7 192.0.2.8 4000 1080\r\n" + socks5Greeting + socks5Request, "\x05\x00" + socks5Yes, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			isBare := make(chan bool, 1)
			h := &proxytest.RecordingHandler{Serve: func(c net.Conn) {
				_, ok := c.(*net.TCPConn)
				isBare <- ok
				proxytest.Echo(c)
				// The handshake's deadlines must be gone.
				if _, err := c.Write(nil); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error(err)
				}
			}}
			a := serveSOCKS5(t, tt.s, h)
			if got := say(t, a, tt.in+early); got != tt.told+early {
				t.Errorf("heard %q, want %q", got, tt.told+early)
			}
			if !<-isBare && !tt.s.AcceptProxy {
				t.Error("the handshake read behind the request")
			}
			f := h.Flows()[0]
			if f.Inbound != "in" || f.User != tt.user || f.Dst != proxy.TCP("example.com", 443) ||
				(f.Client.Addr().String() == "192.0.2.7") != tt.s.AcceptProxy {
				t.Errorf("%+v", f)
			}
		})
	}
}

// The reply says why, and is not lost although the client has sent bytes that nobody reads.
func TestSOCKS5Reject(t *testing.T) {
	tests := []struct {
		err  error
		code byte
	}{
		{errors.New("some"), 1}, {context.Canceled, 1}, {io.ErrUnexpectedEOF, 1}, {proxy.ErrDenied, 2}, {syscall.EACCES, 2},
		{syscall.ENETUNREACH, 3}, {syscall.EHOSTUNREACH, 4}, {&net.DNSError{IsNotFound: true}, 4}, {syscall.ECONNREFUSED, 5},
		{context.DeadlineExceeded, 6}, {syscall.ETIMEDOUT, 6}, {errors.ErrUnsupported, 7}, {syscall.EAFNOSUPPORT, 7},
	}
	for _, tt := range tests {
		t.Run(tt.err.Error(), func(t *testing.T) {
			proxytest.NoLeaks(t)
			a := serveSOCKS5(t, &SOCKS5{}, &proxytest.RecordingHandler{Err: fmt.Errorf("dial: %w", tt.err)})
			got := say(t, a, socks5Greeting+socks5Request+strings.Repeat("unread", 10_000))
			if want := "\x05\x00" + socks5No(tt.code); got != want {
				t.Errorf("heard %q, want %q", got, want)
			}
		})
	}
}

// A client that is refused, and does not go, is not waited for.
func TestSOCKS5RejectDoesNotWait(t *testing.T) {
	proxytest.NoLeaks(t)
	h := &proxytest.RecordingHandler{Err: syscall.ECONNREFUSED}
	a := serveSOCKS5(t, &SOCKS5{Listener: Listener{MaxConns: 1}}, h)
	for range 2 { // the second gets the place of the first
		c := proxytest.Dial(t, a)
		io.WriteString(c, socks5Greeting+socks5Request)
		io.ReadFull(c, make([]byte, 12))
	}
	proxytest.Until(t, "second client", func() bool { return len(h.Flows()) == 2 })
}

func TestSOCKS5Refuses(t *testing.T) {
	users := Users{"ann": "secret"}
	tests := []struct {
		name  string
		users Users
		in    string
		told  string
		log   string
	}{
		{"unknown command", nil, socks5Greeting + "\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", "\x05\x00" + socks5No(7), "command 4"},
		{"wrong password", users, "\x05\x01\x02\x01\x03ann\x05wrong" + socks5Request, "\x05\x02\x01\x01", "reason=denied"},
		{"no password", users, socks5Greeting + socks5Request, "\x05\xff", "reason=denied"},
		{"no users", Users{}, socks5Login + socks5Request, "\x05\x02\x01\x01", "reason=denied"},
		{"address type", nil, socks5Greeting + "\x05\x01\x00\x09" + strings.Repeat("x", 1000), "\x05\x00" + socks5No(8), "address type 9"},
		{"truncated", nil, socks5Greeting + socks5Request[:9], "\x05\x00", "reason=reset"},
		{"SOCKS4", nil, "\x04\x01\x00\x50\x7f\x00\x00\x01user\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00", "client speaks SOCKS4"},
		{"HTTP", nil, "GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n",
			"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n" +
				"This is a SOCKS5 proxy, and HTTP was spoken to it.\r\n", "client speaks HTTP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			var log logBuffer
			h := &proxytest.RecordingHandler{}
			a := serveSOCKS5(t, &SOCKS5{Users: tt.users, Listener: Listener{Log: log.logger()}}, h)
			if got := say(t, a, tt.in); got != tt.told {
				t.Errorf("heard %q, want %q", got, tt.told)
			}
			proxytest.Until(t, "one line in the log", func() bool { return log.count("\n") == 1 })
			if log.count(tt.log) != 1 || log.count("wrong\"") > 0 || len(h.Flows()) > 0 {
				t.Errorf("log %s, flows %v", log.b.String(), h.Flows())
			}
		})
	}
}

// pipeListener hands out one end of each pipe whose other end dial returns.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{} }
func (l *pipeListener) Close() error   { close(l.closed); return nil }
func (l *pipeListener) dial() net.Conn {
	near, far := net.Pipe()
	l.conns <- far
	return near
}

// A handshake that does not come to its end is ended by its deadline, whatever the client does; the
// bubble of synctest ends only when no goroutine is left in it.
func TestSOCKS5HandshakeDeadline(t *testing.T) {
	const timeout = 10 * time.Second
	slowly := func(in string) func(net.Conn) {
		return func(c net.Conn) {
			for i := range len(in) {
				time.Sleep(time.Second)
				if _, err := io.WriteString(c, in[i:i+1]); err != nil {
					return
				}
			}
		}
	}
	tests := map[string]func(net.Conn){ // none closes its conn
		"silent":                   func(net.Conn) {},
		"half":                     func(c net.Conn) { io.WriteString(c, "\x05") },
		"byte by byte":             slowly("\x05\xff" + strings.Repeat("\x00", 255)),
		"does not read the method": func(c net.Conn) { io.WriteString(c, socks5Greeting) },
		"stops within the request": func(c net.Conn) {
			io.WriteString(c, socks5Greeting)
			io.ReadFull(c, make([]byte, 2))
			io.WriteString(c, socks5Request[:len(socks5Request)-1])
		},
	}
	for name, client := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logBuffer
				s := &SOCKS5{Listener: Listener{HandshakeTimeout: timeout, Log: log.logger()}}
				ln := &pipeListener{make(chan net.Conn), make(chan struct{})}
				s.listenOn(ln)
				end := make(chan error)
				h := &proxytest.RecordingHandler{}
				go func() { end <- s.Serve(t.Context(), h) }()
				c := ln.dial()
				defer c.Close()
				said := make(chan bool)
				go func() { client(c); close(said) }()
				time.Sleep(timeout - time.Nanosecond)
				synctest.Wait()
				if log.count("\n") > 0 {
					t.Errorf("ended early: %s", log.b.String())
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if log.count("reason=timeout") != 1 || len(h.Flows()) > 0 {
					t.Errorf("not ended by the deadline: %s", log.b.String())
				}
				if _, err := c.Write([]byte{0}); err == nil {
					t.Error("conn is still open")
				}
				<-said
				s.Close()
				if err := <-end; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A client that does not read its reply holds nobody up.
func TestSOCKS5ReplyDeadline(t *testing.T) {
	for _, reject := range []error{nil, syscall.ECONNREFUSED} {
		synctest.Test(t, func(t *testing.T) {
			s := &SOCKS5{}
			ln := &pipeListener{make(chan net.Conn), make(chan struct{})}
			s.listenOn(ln)
			end := make(chan error)
			h := &proxytest.RecordingHandler{Err: reject}
			go func() { end <- s.Serve(t.Context(), h) }()
			c := ln.dial()
			defer c.Close()
			io.WriteString(c, socks5Greeting)
			io.ReadFull(c, make([]byte, 2))
			io.WriteString(c, socks5Request)
			synctest.Wait() // until it replies
			s.Close()
			begin := time.Now()
			if err := <-end; err != nil {
				t.Error(err)
			}
			if d := time.Since(begin); d != replyTimeout {
				t.Errorf("session ended after %v", d)
			}
			if errs := h.Errs(); reject == nil && (len(errs) != 1 || !errors.Is(errs[0], os.ErrDeadlineExceeded)) {
				t.Errorf("Accept: %v", errs)
			}
		})
	}
}

// direct is a way out for an Engine under test; this package has none of its own.
type direct struct{}

func (direct) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, dst.Network, dst.HostPort())
}

func curl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	proxytest.Need(t, "curl")
	args = append([]string{"-q", "-sS", "--max-time", "20", "--noproxy", ""}, args...)
	out, err := exec.CommandContext(t.Context(), "curl", args...).CombinedOutput()
	return string(out), err
}

// answering is an HTTP origin that gives body to all who ask.
func answering(body string) func(net.Conn) {
	return func(c net.Conn) {
		var got bytes.Buffer
		for !bytes.Contains(got.Bytes(), []byte("\r\n\r\n")) {
			if _, err := io.CopyN(&got, c, 1); err != nil {
				return
			}
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	}
}

func TestSOCKS5ByCurl(t *testing.T) {
	proxytest.NoLeaks(t)
	var log logBuffer
	body := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
	file := filepath.Join(t.TempDir(), "body")
	v4 := proxytest.Listen(t, "tcp", answering(body)).Addr
	v6 := proxytest.Listen(t, "tcp6", answering("six")).Addr
	closed := proxytest.FreePort(t)
	engine := &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: direct{}}, Log: log.logger()}
	open := serveSOCKS5(t, &SOCKS5{}, engine).HostPort()
	guarded := serveSOCKS5(t, &SOCKS5{Users: Users{"ann": "secret"}}, engine).HostPort()

	url4 := "http://" + v4.HostPort() + "/"
	byName := fmt.Sprintf("http://localhost:%d/", v4.Port)
	for _, args := range [][]string{
		{"--socks5", open, url4},
		{"--socks5-hostname", open, byName},
		{"--socks5-hostname", open, "--proxy-user", "who:ever", url4},
		{"--socks5", guarded, "--proxy-user", "ann:secret", url4},
		{"--socks5-hostname", guarded, "--proxy-user", "ann:secret", byName},
	} {
		if out, err := curl(t, append(args, "-o", file)...); err != nil {
			t.Errorf("curl %q: %v: %s", args, err, out)
		}
		if got, _ := os.ReadFile(file); string(got) != body {
			t.Errorf("curl %q: %d bytes, want %d", args, len(got), len(body))
		}
	}
	for _, option := range []string{"--socks5", "--socks5-hostname"} {
		if out, err := curl(t, option, open, "http://"+v6.HostPort()+"/"); out != "six" {
			t.Errorf("curl %s to IPv6: %v: %s", option, err, out)
		}
	}
	for _, refused := range []struct {
		args []string
		says string
	}{
		{[]string{"--socks5", open, fmt.Sprintf("http://127.0.0.1:%d/", closed)}, "(5)"},
		{[]string{"--socks5-hostname", open, "http://name.invalid/"}, "(4)"},
		{[]string{"--socks5", guarded, url4}, "No authentication method was acceptable"},
		{[]string{"--socks5", guarded, "--proxy-user", "ann:wrong", url4}, "rejected"},
		{[]string{"--socks4", open, url4}, "SOCKS4"},
		{[]string{"--proxy", "http://" + open, url4, "-f"}, "400"},
	} {
		if out, err := curl(t, refused.args...); err == nil || !strings.Contains(out, refused.says) {
			t.Errorf("curl %q: %v: %s; want it to say %q", refused.args, err, out, refused.says)
		}
	}
	proxytest.Until(t, "the end of all sessions", func() bool { return engine.Sessions() == 0 })
	if log.count("user=ann") != 2 || log.count("msg=session ") != 7 {
		t.Error(log.b.String())
	}
}

// A half-close and a reset go through, from either side, as they were.
func TestSOCKS5Endings(t *testing.T) {
	proxytest.NoLeaks(t)
	engine := &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: direct{}}}
	a := serveSOCKS5(t, &SOCKS5{}, engine)
	t.Run("half-close", func(t *testing.T) {
		o := proxytest.Listen(t, "tcp", proxytest.AfterEOF(bytes.ToUpper))
		c := connectSOCKS5(t, a, o.Addr)
		io.WriteString(c, "request")
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "REQUEST" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("reset by the origin", func(t *testing.T) {
		c := connectSOCKS5(t, a, proxytest.Listen(t, "tcp", proxytest.Abort).Addr)
		io.WriteString(c, "x")
		if !proxytest.Resets(c) {
			t.Error("the client sees no reset")
		}
	})
	t.Run("reset by the client", func(t *testing.T) {
		reset := make(chan bool, 1)
		c := connectSOCKS5(t, a, proxytest.Listen(t, "tcp", func(c net.Conn) { reset <- proxytest.Resets(c) }).Addr)
		relay.Abort(c)
		if !<-reset {
			t.Error("the origin sees no reset")
		}
	})
}

// connectSOCKS5 connects through the proxy at a to dst.
func connectSOCKS5(t *testing.T, a, dst proxy.Addr) *net.TCPConn {
	t.Helper()
	c := proxytest.Dial(t, a).(*net.TCPConn)
	request := append([]byte(socks5Greeting+"\x05\x01\x00\x01"), dst.IP().AsSlice()...)
	c.Write(append(request, byte(dst.Port>>8), byte(dst.Port)))
	got := make([]byte, 12)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "\x05\x00"+socks5Yes {
		t.Fatalf("heard %q, %v", got, err)
	}
	return c
}
