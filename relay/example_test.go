package relay_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// A port forward in ten lines. The client half-closes after its request, as nc -N does, and still
// gets its reply.
func ExampleJoin() {
	origin := listen()
	defer origin.Close()
	go answer(origin) // reads a request up to its end, and then replies

	forward := listen()
	defer forward.Close()
	go func() {
		client, err := forward.Accept()
		if err != nil {
			return
		}
		upstream, err := net.Dial("tcp", origin.Addr().String())
		if err != nil {
			relay.Abort(client) // refused, as the origin refused us
			return
		}
		relay.Join(context.Background(), client, upstream) // closes both
	}()

	c := dial(forward)
	defer c.Close()
	io.WriteString(c, "hello")
	c.CloseWrite()
	reply, err := io.ReadAll(c)
	fmt.Printf("%s %v\n", reply, err)
	// Output: HELLO <nil>
}

// Settings are fields of a Relay, and a Stats can be read while bytes move. The result says how each
// direction ended and who was first.
func ExampleRelay_Join() {
	client, a := conns()
	b, origin := conns()

	r := relay.Relay{Idle: 10 * time.Minute, HalfOpen: time.Minute}
	var stats relay.Stats
	over := make(chan relay.Result)
	go func() { over <- r.Join(context.Background(), a, b, &stats) }()

	io.WriteString(client, "ping")
	io.ReadFull(origin, make([]byte, 4))
	// Now, or at any other time, stats.Bytes() says how far it is.

	io.WriteString(origin, "pong, and bye")
	origin.Close()
	reply, _ := io.ReadAll(client)
	fmt.Printf("%s\n", reply)
	client.Close()

	res := <-over
	fmt.Println(res.AToB.Bytes, res.AToB.End)
	fmt.Println(res.BToA.Bytes, res.BToA.End)
	fmt.Println(res.First, res.Err())
	fmt.Println(stats.Bytes())
	// Output:
	// pong, and bye
	// 4 eof
	// 13 eof
	// b <nil>
	// 4 13
}

// A started pair goes on by itself: no goroutine of the caller's waits for it. Where the kernel engine
// carries it, none of the relay's does either.
func ExampleRelay_Start() {
	client, a := conns()
	b, origin := conns()

	var r relay.Relay
	over := make(chan struct{})
	pair := r.Start(a, b, nil, func(res relay.Result) {
		fmt.Println(res.AToB.End, "first:", res.First)
		close(over)
	})

	io.WriteString(client, "half a request")
	io.ReadFull(origin, make([]byte, len("half a request")))
	pair.Abort(nil) // as a cancelled context does
	<-over
	_, err := io.ReadAll(client)
	fmt.Println("client was reset:", err != nil)
	_, err = io.ReadAll(origin)
	fmt.Println("origin was reset:", err != nil)
	// Output:
	// cancel first: none
	// client was reset: true
	// origin was reset: true
}

// A handshake that reads with a buffer has read too many bytes. They are put back, and the relay still
// carries the bare conn.
func ExampleWithHead() {
	client, a := conns()
	b, origin := conns()
	io.WriteString(client, "CONNECT example.com\nfirst bytes of the stream")
	client.CloseWrite()

	buffered := bufio.NewReader(a)
	line, _ := buffered.ReadString('\n')
	early, _ := buffered.Peek(buffered.Buffered())
	fmt.Printf("asked for %q\n", strings.TrimSpace(line))

	go relay.Join(context.Background(), relay.WithHead(a, early), b)
	stream, _ := io.ReadAll(origin)
	fmt.Printf("%s\n", stream)
	origin.Close()
	client.Close()
	// Output:
	// asked for "CONNECT example.com"
	// first bytes of the stream
}

// peeked is a conn that has looked at the first bytes of the stream.
type peeked struct {
	net.Conn
	head []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.head) > 0 {
		n := copy(b, p.head)
		p.head = p.head[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// Unwrap makes it a relay.Transparent: it changes no byte, so the relay may take it off.
func (p *peeked) Unwrap() (io.ReadWriteCloser, []byte) { return p.Conn, p.head }

// A wrapper of your own that changes no byte says so, and then costs nothing.
func ExampleTransparent() {
	client, a := conns()
	b, origin := conns()
	io.WriteString(client, "GET / HTTP/1.1\r\n")
	client.CloseWrite()

	p := &peeked{Conn: a, head: make([]byte, 4)}
	io.ReadFull(a, p.head)
	fmt.Printf("%s looks like HTTP\n", p.head[:3])

	go relay.Join(context.Background(), p, b)
	stream, _ := io.ReadAll(origin)
	fmt.Printf("%q\n", stream)
	origin.Close()
	client.Close()
	// Output:
	// GET looks like HTTP
	// "GET / HTTP/1.1\r\n"
}

// listen returns a listener on loopback.
func listen() net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return ln
}

// dial connects to ln.
func dial(ln net.Listener) *net.TCPConn {
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// conns returns the two ends of a connection: in a program, one from Dial and the other from Accept.
func conns() (near, far *net.TCPConn) {
	ln := listen()
	defer ln.Close()
	near = dial(ln)
	c, err := ln.Accept()
	if err != nil {
		log.Fatal(err)
	}
	return near, c.(*net.TCPConn)
}

// answer serves one client of ln: it reads up to the end, and then replies.
func answer(ln net.Listener) {
	c, err := ln.Accept()
	if err != nil {
		return
	}
	request, _ := io.ReadAll(c)
	io.WriteString(c, strings.ToUpper(string(request)))
	c.Close()
}
