package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pattern yields deterministic bytes that repeat with no power of two, so that a block which is
// lost, doubled or out of order changes the hash.
type pattern struct {
	left int64
	at   int
}

var patternBytes = sync.OnceValue(func() []byte {
	b, x := make([]byte, 1000003), uint32(1)
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
})

func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	src := patternBytes()
	n := copy(b[:min(int64(len(b)), p.left)], src[p.at:])
	p.left -= int64(n)
	p.at = (p.at + n) % len(src)
	return n, nil
}

// sum returns the hash of what r yields.
func sum(r io.Reader) string {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err.Error()
	}
	return hex.EncodeToString(h.Sum(nil))
}

// httpOrigin starts an origin that knows the paths of serveHTTP, and returns its address.
func httpOrigin(t *testing.T, ip string) string {
	t.Helper()
	return httpOriginOf(t, ip, serveHTTP)
}

func httpOriginOf(t *testing.T, ip string, serve http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: serve}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return ln.Addr().String()
}

func serveHTTP(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
	switch r.URL.Path {
	case "/hello":
		io.WriteString(w, "hello\n")
	case "/request": // what came of the request
		fmt.Fprintf(w, "%s %s %s host=%s proxy-connection=%q\n", r.Method, r.RequestURI, r.Proto, r.Host, r.Header.Get("Proxy-Connection"))
	case "/sum": // hash of the body
		fmt.Fprintln(w, sum(r.Body))
	case "/bytes":
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		if r.Method != http.MethodHead {
			io.Copy(w, &pattern{left: n})
		}
	case "/chunked":
		for i := range 20 {
			fmt.Fprintf(w, "part %d\n", i)
			w.(http.Flusher).Flush()
		}
	case "/slow": // n bytes in 10 parts, one each 100 ms
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		for range 10 {
			w.Write(make([]byte, n/10))
			w.(http.Flusher).Flush()
			select {
			case <-time.After(100 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
	case "/endless":
		for r.Context().Err() == nil {
			w.Write(make([]byte, 1000))
			w.(http.Flusher).Flush()
			select {
			case <-time.After(50 * time.Millisecond):
			case <-r.Context().Done():
			}
		}
	case "/aborted": // promises n bytes, sends half and resets
		abortAfter(w, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", n), n/2)
	case "/aborted-chunked":
		abortAfter(w, fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n", n), n/2)
	case "/aborted-close": // a body that ends with the connection
		abortAfter(w, "HTTP/1.0 200 OK\r\n\r\n", n)
	default:
		http.NotFound(w, r)
	}
}

// abortAfter sends head and n bytes, and resets the connection once they are acknowledged.
func abortAfter(w http.ResponseWriter, head string, n int64) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	io.Copy(c, io.MultiReader(strings.NewReader(head), &pattern{left: n}))
	drained(c.(*net.TCPConn))
	c.(*net.TCPConn).SetLinger(0)
}

// drained waits until the peer's kernel has all that was written.
func drained(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		queued := 1
		raw.Control(func(fd uintptr) { queued, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		if queued == 0 {
			return
		}
	}
}

// tcpOrigin starts an origin whose every connection is carried by serve, and returns its address.
func tcpOrigin(t *testing.T, serve func(c *net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", freeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.Map
	var wg sync.WaitGroup
	carry := func(c *net.TCPConn) {
		defer conns.Delete(c)
		defer c.Close()
		serve(c)
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Store(c, nil)
			wg.Go(func() { carry(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		wg.Wait()
	})
	return ln.Addr().String()
}

// echo returns every byte, and the end.
func echo(c *net.TCPConn) {
	io.Copy(struct{ io.Writer }{c}, c)
	c.CloseWrite()
}

// lateReply reads to the end, lets some time pass, and then answers with the hash of what it read.
func lateReply(c *net.TCPConn) {
	hash := sum(c)
	time.Sleep(200 * time.Millisecond)
	fmt.Fprintln(c, hash)
}

// refusedAddr returns an address where nobody listens.
func refusedAddr(t *testing.T) string { return freeAddr(t) }

// blackHole is an address that never answers: a listener whose queue is full, so that the kernel
// drops what comes.
type blackHole struct {
	addr string
	ln   *net.TCPListener
	fill []net.Conn
}

func newBlackHole(t *testing.T) *blackHole {
	t.Helper()
	ln, err := net.Listen("tcp", freeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	b := &blackHole{addr: ln.Addr().String(), ln: ln.(*net.TCPListener)}
	t.Cleanup(func() {
		b.ln.Close()
		for _, c := range b.fill {
			c.Close()
		}
	})
	raw, err := b.ln.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) }) // shrinks the queue
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		c, err := net.DialTimeout("tcp", b.addr, 300*time.Millisecond)
		if err != nil {
			return b
		}
		b.fill = append(b.fill, c)
	}
	t.Fatal("a listener with a queue of length 0 takes everything")
	return nil
}

// open lets the next connection through, at the dialer's next SYN, and returns it.
func (b *blackHole) open(t *testing.T) *net.TCPConn {
	t.Helper()
	b.ln.SetDeadline(time.Now().Add(patience))
	for {
		c, err := b.ln.AcceptTCP()
		if err != nil {
			t.Fatal("black hole opened: ", err)
		}
		ours := false
		for _, f := range b.fill {
			ours = ours || f.LocalAddr().String() == c.RemoteAddr().String()
		}
		if !ours {
			return c
		}
		defer c.Close()
	}
}
