package inbound

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// readRequestHead reads a request without content.
func readRequestHead(r *bufio.Reader) string {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String()
		}
	}
}

// scripted starts an origin that reads a request's head and then runs answer.
func scripted(t *testing.T, answer func(c net.Conn, r *bufio.Reader)) *proxytest.Origin {
	return proxytest.Listen(t, "tcp", func(c net.Conn) {
		r := bufio.NewReader(c)
		readRequestHead(r)
		answer(c, r)
	})
}

func get(c net.Conn, o *proxytest.Origin, headers string) {
	fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n%s\r\n", o.Addr.HostPort(), headers)
}

// TestHTTPTornAnswer checks that an answer which its origin has not completed does not look complete,
// however it is delimited, and that what there was of it has arrived.
func TestHTTPTornAnswer(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	const part = "some of it"
	for _, tt := range []struct {
		name, head string
		end        func(net.Conn)
	}{
		{"length, FIN", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + part, func(c net.Conn) { c.Close() }},
		{"length, RST", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + part, reset},
		{"chunked, FIN", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n" + part + "\r\n", func(c net.Conn) { c.Close() }},
		{"close, RST", "HTTP/1.0 200 OK\r\n\r\n" + part, reset},
	} {
		for _, request := range []string{"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/ HTTP/1.0\r\n\r\n"} {
			t.Run(tt.name+" to "+request[len("GET http://%s/ "):][:8], func(t *testing.T) {
				o := scripted(t, func(c net.Conn, _ *bufio.Reader) {
					io.WriteString(c, tt.head)
					time.Sleep(20 * time.Millisecond) // a reset discards what the other end has not read
					tt.end(c)
				})
				c := dialAddr(t, addr)
				fmt.Fprintf(c, request, o.Addr.HostPort())
				got, err := io.ReadAll(c)
				if !errors.Is(err, syscall.ECONNRESET) || !strings.Contains(string(got), part) {
					t.Errorf("got %q, %v", got, err)
				}
			})
		}
	}
}

// TestHTTPTornAnswerToSlowReader checks that a reset waits for what is still to be delivered.
func TestHTTPTornAnswerToSlowReader(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	const size = 1 << 20
	half := make(chan struct{})
	tell := sync.OnceFunc(func() { close(half) })
	o := scripted(t, func(c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n")
		io.CopyN(c, proxytest.Pattern(), size)
		<-half
		reset(c)
	})
	c := dialAddr(t, addr)
	c.SetReadBuffer(32 << 10)
	fmt.Fprintf(c, "GET http://%s/ HTTP/1.0\r\n\r\n", o.Addr.HostPort())
	defer tell()
	n := int64(0)
	buf := make([]byte, 64<<10)
	for {
		m, err := c.Read(buf)
		if n += int64(m); err != nil {
			if n < size || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %d bytes, %v", n, err)
			}
			return
		}
		if n > size/2 {
			tell()
		}
		time.Sleep(time.Millisecond)
	}
}

// TestHTTPHalfClosedClient checks that a client gets its answer which has ended its own bytes before.
func TestHTTPHalfClosedClient(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	o := scripted(t, func(c net.Conn, _ *bufio.Reader) {
		time.Sleep(50 * time.Millisecond)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
		time.Sleep(50 * time.Millisecond)
		io.WriteString(c, "answer")
		io.Copy(io.Discard, c)
	})
	c := dialAddr(t, addr)
	get(c, o, "")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "\r\n\r\nanswer") {
		t.Errorf("got %q, %v", got, err)
	}
	t.Run("nc", func(t *testing.T) {
		proxytest.Need(t, "sh", "nc")
		host, port, _ := net.SplitHostPort(addr)
		out := sh(t, fmt.Sprintf(`printf 'GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n' | nc -N %s %s`, o.Addr.HostPort(), host, port))
		if !strings.HasSuffix(out, "answer") {
			t.Errorf("nc got %q", out)
		}
	})
}

// TestHTTPClientReset checks that an origin sees the client's reset, whatever is going on, and that a
// dial is given up for it.
func TestHTTPClientReset(t *testing.T) {
	gaveUp := make(chan struct{}, 1)
	d := dialFunc(func(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
		if dst.Host != "silent.test" {
			return hosts(nil).DialStream(ctx, dst)
		}
		<-ctx.Done()
		gaveUp <- struct{}{}
		return nil, ctx.Err()
	})
	addr, _ := startHTTP(t, new(HTTP), d)
	for _, tt := range []struct{ name, request, answer string }{
		{"waiting", "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		{"downloading", "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\npart"},
		{"uploading", "POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\npart", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ready, ended := make(chan struct{}), make(chan error, 1)
			o := scripted(t, func(c net.Conn, r *bufio.Reader) {
				io.WriteString(c, tt.answer)
				close(ready)
				_, err := io.Copy(io.Discard, r)
				ended <- err
			})
			c := dialAddr(t, addr)
			fmt.Fprintf(c, tt.request, o.Addr.HostPort())
			<-ready
			if tt.answer != "" {
				c.Read(make([]byte, 1))
			}
			reset(c)
			select {
			case err := <-ended:
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the origin sees %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Error("the origin sees nothing")
			}
		})
	}
	t.Run("dialling", func(t *testing.T) {
		c := dialAddr(t, addr)
		io.WriteString(c, "GET http://silent.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
		time.Sleep(20 * time.Millisecond)
		start := time.Now()
		reset(c)
		<-gaveUp
		if took := time.Since(start); took > 1500*time.Millisecond { // the dial's own limit is 2 s
			t.Errorf("given up after %v", took)
		}
	})
}

type dialFunc func(ctx context.Context, dst proxy.Addr) (net.Conn, error)

func (f dialFunc) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	return f(ctx, dst)
}

// TestHTTPClientLeavesStalledUpload checks that nothing is left of a session whose origin reads
// nothing, when the client goes.
func TestHTTPClientLeavesStalledUpload(t *testing.T) {
	h := new(cancelled)
	addr := serveHTTP(t, new(HTTP), h, h.sessions)
	release := make(chan struct{})
	o := proxytest.Listen(t, "tcp", func(c net.Conn) { <-release })
	defer close(release)
	c := dialAddr(t, addr)
	fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", o.Addr.HostPort())
	c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	io.CopyN(c, proxytest.Pattern(), 1000000000)
	reset(c)
	proxytest.Until(t, "the session ends", func() bool { return h.began.Load() && h.sessions() == 0 })
}

// cancelled is a handler for one session.
type cancelled struct {
	proxy.Engine
	began atomic.Bool
}

func (h *cancelled) sessions() int { return h.Engine.Sessions() }

func (h *cancelled) HandleStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	h.Router = proxy.Static{Dialer: hosts(nil)}
	context.AfterFunc(ctx, func() { h.Abort() })
	h.Engine.HandleStream(ctx, f, p)
	h.began.Store(true)
}

// TestHTTPUpgrade checks a conn that switches protocols: bytes sent too early, half-close both ways, resets.
func TestHTTPUpgrade(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
	upgrade := func(t *testing.T, o *proxytest.Origin) (*net.TCPConn, *bufio.Reader) {
		c := dialAddr(t, addr)
		get(c, o, "Connection: upgrade\r\nUpgrade: echo\r\n")
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "echo" {
			t.Fatalf("got %v, %v", resp, err)
		}
		return c, r
	}
	t.Run("half-close", func(t *testing.T) {
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, switching+"hello, ")
			b, _ := io.ReadAll(r)
			c.Write(b)
			c.(*net.TCPConn).CloseWrite()
		})
		c, r := upgrade(t, o)
		io.WriteString(c, "echo")
		c.CloseWrite()
		if got, err := io.ReadAll(r); err != nil || string(got) != "hello, echo" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("early bytes", func(t *testing.T) {
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, switching)
			b, _ := io.ReadAll(r)
			c.Write(b)
		})
		c := dialAddr(t, addr)
		get(c, o, "Connection: upgrade\r\nUpgrade: echo\r\n\r\nearly")
		c.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil || !strings.HasSuffix(string(got), "\r\n\r\nearly\r\n") {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("origin resets", func(t *testing.T) {
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, switching+"last words")
			io.ReadFull(r, make([]byte, 2))
			reset(c)
		})
		c, r := upgrade(t, o)
		io.WriteString(c, "go")
		if got, err := io.ReadAll(r); !errors.Is(err, syscall.ECONNRESET) || string(got) != "last words" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		ended := make(chan error, 1)
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, switching)
			_, err := io.Copy(io.Discard, r)
			ended <- err
		})
		c, _ := upgrade(t, o)
		reset(c)
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the origin sees %v", err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
		})
		c := dialAddr(t, addr)
		get(c, o, "Connection: upgrade\r\nUpgrade: echo\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 426 {
			t.Errorf("got %v, %v", resp, err)
		}
	})
}

// TestHTTPOriginAnswersEarly checks that an answer arrives which the origin gives without reading the request.
func TestHTTPOriginAnswersEarly(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	o := scripted(t, func(c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
	})
	c := dialAddr(t, addr)
	fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", o.Addr.HostPort())
	go io.CopyN(c, proxytest.Pattern(), 1000000)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 413 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "no" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestHTTPOriginTalksNonsense checks the answers for origins that do not speak HTTP.
func TestHTTPOriginTalksNonsense(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	for _, tt := range []struct{ says, want string }{
		{"SSH-2.0-x\r\n\r\n", "http_protocol_error"}, {"", "connection_terminated"}, {"HTTP/1.1 2", "http_protocol_error"},
	} {
		o := scripted(t, func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, tt.says) })
		c := dialAddr(t, addr)
		get(c, o, "")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != 502 || !strings.HasSuffix(resp.Header.Get("Proxy-Status"), tt.want) {
			t.Errorf("%q: got %v, %v", tt.says, resp, err)
		}
	}
}

// TestHTTPOriginsAreOneClients checks that conns to origins are not shared between clients, and end
// with their client.
func TestHTTPOriginsAreOneClients(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	ended := make(chan struct{}, 2)
	o := proxytest.Listen(t, "tcp", func(c net.Conn) {
		r := bufio.NewReader(c)
		for readRequestHead(r) != "" {
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
		ended <- struct{}{}
	})
	var clients []net.Conn
	for range 2 {
		c := dialAddr(t, addr)
		r := bufio.NewReader(c)
		for range 3 {
			get(c, o, "")
			if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 204 {
				t.Fatalf("got %v, %v", resp, err)
			}
		}
		clients = append(clients, c)
	}
	if n := o.Accepted(); n != 2 {
		t.Errorf("%d conns for two clients", n)
	}
	for _, c := range clients {
		c.Close()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("the origin's conn outlives the client's")
		}
	}
}

// TestHTTPCloseEndsIdleClients checks that clients between two requests do not hold up a graceful
// stop, and that one whose request is being answered gets the answer first.
func TestHTTPCloseEndsIdleClients(t *testing.T) {
	s := new(HTTP)
	addr, _ := startHTTP(t, s, hosts(nil))
	asked, answer := make(chan struct{}, 2), make(chan struct{}, 2)
	o := proxytest.Listen(t, "tcp", func(c net.Conn) {
		for r := bufio.NewReader(c); readRequestHead(r) != ""; {
			asked <- struct{}{}
			<-answer
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	idle, busy := dialAddr(t, addr), dialAddr(t, addr)
	get(idle, o, "")
	<-asked
	answer <- struct{}{}
	r := bufio.NewReader(idle)
	http.ReadResponse(r, nil)
	get(busy, o, "")
	<-asked
	time.Sleep(20 * time.Millisecond) // for net/http to see that the idle one is idle
	s.Close()
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("the idle client sees %v", err)
	}
	idle.Close()
	answer <- struct{}{}
	if got, err := io.ReadAll(busy); err != nil || !strings.Contains(string(got), "Connection: close\r\n") {
		t.Errorf("the busy client got %q, %v", got, err)
	}
}

// TestHTTPRequestTarget checks that a target reaches the origin byte for byte.
func TestHTTPRequestTarget(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	lines := make(chan string, 1)
	o := proxytest.Listen(t, "tcp", func(c net.Conn) {
		lines <- readRequestHead(bufio.NewReader(c))
		io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
	})
	for _, tt := range []struct{ method, target, want string }{
		{"GET", "", "/"}, {"GET", "/", "/"}, {"GET", "?q", "/?q"}, {"GET", "/?", "/?"}, {"GET", "/a?b?c&d;e=%zz", "/a?b?c&d;e=%zz"},
		{"GET", "/%7e%2F/../x|y", "/%7e%2F/../x|y"}, {"GET", "//x/y", "//x/y"},
		{"OPTIONS", "", "*"}, {"OPTIONS", "/", "/"},
	} {
		c := dialAddr(t, addr)
		fmt.Fprintf(c, "%s http://me:secret@%s%s HTTP/1.1\r\nHost: other\r\n\r\n", tt.method, o.Addr.HostPort(), tt.target)
		want := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n\r\n", tt.method, tt.want, o.Addr.HostPort())
		if got := <-lines; got != want {
			t.Errorf("%s: the origin got %q, want %q", tt.target, got, want)
		}
	}
}

// TestStream checks that both ends of a stream in memory can end it in each way.
func TestStream(t *testing.T) {
	var _ relay.HalfCloser = (*stream)(nil)
	var _ relay.Aborter = (*stream)(nil)
	a, b := newStream()
	go func() {
		io.WriteString(a, "to b")
		a.CloseWrite()
	}()
	if got, err := io.ReadAll(b); err != nil || string(got) != "to b" {
		t.Errorf("b got %q, %v", got, err)
	}
	go func() {
		io.WriteString(b, "to a")
		b.Abort()
	}()
	if got, err := io.ReadAll(a); err != syscall.ECONNRESET || string(got) != "to a" {
		t.Errorf("a got %q, %v", got, err)
	}
	if err := a.SetDeadline(time.Now()); err != os.ErrNoDeadline {
		t.Error(err)
	}
}

func reset(c net.Conn) { relay.Abort(c) }
