package inbound

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestHTTPRefusalOfContentThatNeverComes checks that a client hears no although it has not sent the content that it has announced,
// and that it cannot stay for as long as it does not send it.
func TestHTTPRefusalOfContentThatNeverComes(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		users      Users
	}{
		{"no password", "HTTP/1.1 407 ", Users{"me": "secret"}},
		{"refused", "HTTP/1.1 502 ", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, _ := startHTTP(t, &HTTP{Users: tt.users}, hosts{"refused.test": syscall.ECONNREFUSED})
			for _, content := range []string{"Content-Length: 10", "Transfer-Encoding: chunked", "Expect: 100-continue\r\nContent-Length: 10"} {
				c := dialAddr(t, addr)
				c.SetDeadline(time.Now().Add(proxytest.Patience))
				fmt.Fprintf(c, "POST http://refused.test/ HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", content)
				if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), tt.want) {
					t.Errorf("%s: got %q, %v", content, got, err)
				}
			}
		})
	}
}

// TestHTTPUnauthorizedEndsConn checks that who has no password does not stay.
func TestHTTPUnauthorizedEndsConn(t *testing.T) {
	addr, _ := startHTTP(t, &HTTP{Users: Users{"me": "secret"}}, hosts(nil))
	c := dialAddr(t, addr)
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	fmt.Fprintf(c, "GET http://a.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 407 ") {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestHTTPConversation checks that an answer arrives which the origin begins, and the client reads, before the request is complete.
func TestHTTPConversation(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	o := scripted(t, func(c net.Conn, r *bufio.Reader) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		for range 3 {
			r.ReadString('\n') // a chunk's length
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			r.ReadString('\n')
			fmt.Fprintf(c, "%x\r\n%s\r\n", len(line), line)
		}
		io.WriteString(c, "0\r\n\r\n")
	})
	c := dialAddr(t, addr)
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", o.Addr.HostPort())
	say := func(s string) { fmt.Fprintf(c, "%x\r\n%s\r\n", len(s), s) }
	say("one\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer := bufio.NewReader(resp.Body)
	for i, s := range []string{"one\n", "two\n", "three\n"} {
		if i > 0 {
			say(s)
		}
		if got, err := answer.ReadString('\n'); err != nil || got != s {
			t.Fatalf("got %q, %v; want %q", got, err, s)
		}
	}
	io.WriteString(c, "0\r\n\r\n")
	if _, err := answer.ReadByte(); err != io.EOF {
		t.Errorf("after the answer: %v", err)
	}
}

// TestHTTPAnswerBeforeContent checks that an answer which its origin has completed before the client has sent all that it announced is
// complete for the client, too, and that what the client sends then is not taken for a request.
func TestHTTPAnswerBeforeContent(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	for _, head := range []string{"Content-Length: 2\r\n\r\nno", "Transfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n"} {
		o := scripted(t, func(c net.Conn, r *bufio.Reader) {
			r.ReadByte()
			io.WriteString(c, "HTTP/1.1 413 Too Large\r\n"+head)
		})
		for _, content := range []string{"Content-Length: 100000", "Transfer-Encoding: chunked"} {
			c := dialAddr(t, addr)
			c.SetDeadline(time.Now().Add(proxytest.Patience))
			fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n3\r\nabc\r\n", o.Addr.HostPort(), content)
			r := bufio.NewReader(c)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s, %q: %v", content, head, err)
			}
			if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "no" || resp.StatusCode != 413 {
				t.Errorf("%s, %q: got %v %q, %v", content, head, resp.Status, b, err)
			}
			get(c, o, "")
			got, err := io.ReadAll(r)
			if err != nil && !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 && !strings.HasPrefix(string(got), "HTTP/1.1 400 ") {
				t.Errorf("%s, %q: then got %q, %v", content, head, got, err)
			}
		}
	}
}

// TestHTTPTornAnswerBeforeContent checks that a client hears of an answer that was broken off before it has sent all that it announced.
func TestHTTPTornAnswerBeforeContent(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	o := scripted(t, func(c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
	})
	c := dialAddr(t, addr)
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n", o.Addr.HostPort())
	got, err := io.ReadAll(c)
	if !errors.Is(err, syscall.ECONNRESET) || !strings.HasSuffix(string(got), "\r\n\r\npart") {
		t.Errorf("got %q, %v", got, err)
	}
}

// flowsOf is an engine that records the flows it is given.
type flowsOf struct {
	*proxy.Engine
	mu    sync.Mutex
	flows []proxy.Flow
}

func (h *flowsOf) HandleStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	h.mu.Lock()
	h.flows = append(h.flows, f)
	h.mu.Unlock()
	h.Engine.HandleStream(ctx, f, p)
}

// TestHTTPUserOfAnotherRequest checks that a request does not go out over a conn that was routed for another user, as
// happens behind a proxy whose users share its conns.
func TestHTTPUserOfAnotherRequest(t *testing.T) {
	h := &flowsOf{Engine: &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: hosts(nil)}}}
	addr := serveHTTP(t, &HTTP{Users: Users{"a": "1", "b": "2"}}, h, h.Sessions)
	o := proxytest.Listen(t, "tcp", func(c net.Conn) {
		for r := bufio.NewReader(c); readRequestHead(r) != ""; {
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	c := dialAddr(t, addr)
	r := bufio.NewReader(c)
	for _, auth := range []string{"YTox", "YTox", "Yjoy", "YTox"} {
		get(c, o, "Proxy-Authorization: Basic "+auth+"\r\n")
		if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 204 {
			t.Fatalf("got %v, %v", resp, err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var users []string
	for _, f := range h.flows {
		users = append(users, f.User)
	}
	if got := strings.Join(users, " "); got != "a b a" {
		t.Errorf("sessions of the users %q, want those of a, b and a", got)
	}
}

// TestHTTPRequestTrailer checks that what a client says behind its content arrives.
func TestHTTPRequestTrailer(t *testing.T) {
	addr, _ := startHTTP(t, new(HTTP), hosts(nil))
	o := origin(t)
	c := dialAddr(t, addr)
	fmt.Fprintf(c, "POST %s/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\nConnection: close\r\n\r\n"+
		"3\r\nabc\r\n0\r\nX-Sum: 42\r\n\r\n", o.URL)
	if got, err := io.ReadAll(c); err != nil || !strings.Contains(string(got), "X-Sum:[42]") {
		t.Errorf("got %q, %v", got, err)
	}
}
