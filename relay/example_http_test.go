package relay_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// connect is an HTTP proxy for CONNECT.
func connect(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		http.Error(w, "this proxy only knows CONNECT", http.StatusMethodNotAllowed)
		return
	}
	client, buf, err := http.NewResponseController(w).Hijack()
	if err != nil { // HTTP/2 has no conn to hand over
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	early, _ := buf.Reader.Peek(buf.Reader.Buffered()) // came together with the request

	// Not r.Context(): the server ends it when the client half-closes, which still waits for its reply.
	ctx, stop := relay.ResetContext(context.Background(), client)
	var d net.Dialer
	origin, err := d.DialContext(ctx, "tcp", r.Host)
	stop()
	if err != nil {
		io.WriteString(client, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		client.Close()
		return
	}
	io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n") // an error shows itself in the relay
	relay.Join(context.Background(), relay.WithHead(client, early), origin)
}

// A hijacked conn comes with a reader that may have read too many bytes. Those in the buffer are put
// back; the conn, and not the buffer, is relayed.
func ExampleWithHead_hijack() {
	origin := listen()
	defer origin.Close()
	go answer(origin) // reads a request up to its end, and then replies

	proxy := listen()
	server := &http.Server{Handler: http.HandlerFunc(connect)}
	go server.Serve(proxy)
	defer server.Close()

	c := dial(proxy)
	defer c.Close()
	fmt.Fprintf(c, "CONNECT %v HTTP/1.1\r\nHost: %[1]v\r\n\r\nhello, early", origin.Addr())
	c.CloseWrite()
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		fmt.Println(err)
		return
	}
	reply, err := io.ReadAll(r)
	fmt.Printf("%s: %s %v\n", resp.Status, reply, err)
	// Output: 200 OK: HELLO, EARLY <nil>
}

// sessions are the pairs that a program has started and not yet seen the end of.
type sessions struct {
	relay relay.Relay
	all   sync.WaitGroup
	mu    sync.Mutex
	pairs map[*relay.Pair]struct{}
}

func (s *sessions) start(client, origin net.Conn) {
	s.all.Add(1)
	s.mu.Lock() // done may be called before Start has returned, and waits here until the pair is known
	defer s.mu.Unlock()
	var p *relay.Pair
	p = s.relay.Start(client, origin, nil, func(res relay.Result) {
		go func() { // done must not block, and this may
			s.mu.Lock()
			delete(s.pairs, p)
			s.mu.Unlock()
			s.all.Done()
		}()
	})
	s.pairs[p] = struct{}{}
}

// shutdown ends them all and waits until they are gone.
func (s *sessions) shutdown(cause error) (ended int) {
	s.mu.Lock()
	for p := range s.pairs {
		p.Abort(cause)
		ended++
	}
	s.mu.Unlock()
	s.all.Wait()
	return ended
}

// A program that starts its pairs keeps them, so that it can end them all and wait for the last.
func ExampleRelay_Start_shutdown() {
	s := sessions{pairs: make(map[*relay.Pair]struct{})}
	var clients []net.Conn
	for range 100 {
		client, a := conns()
		b, origin := conns()
		defer origin.Close()
		s.start(a, b)
		clients = append(clients, client)
	}

	fmt.Println(s.shutdown(errors.New("shutdown")), "were open")
	_, err := clients[0].Read(make([]byte, 1))
	fmt.Println("clients were reset:", err != nil && err != io.EOF)
	// Output:
	// 100 were open
	// clients were reset: true
}

// All relays of one customer share a rate: together they pass on no more, and none of them takes it all.
func ExampleNewLimiter() {
	r := relay.Relay{Shared: relay.NewLimiter(1 << 20)} // 1 MiB a second
	start := time.Now()
	var transfers sync.WaitGroup
	for range 2 {
		client, a := conns()
		b, origin := conns()
		r.Start(a, b, nil, nil)
		transfers.Go(func() {
			client.Write(make([]byte, 128<<10))
			client.Close()
		})
		transfers.Go(func() {
			io.Copy(io.Discard, origin)
			origin.Close()
		})
	}
	transfers.Wait()
	fmt.Println("a quarter of a MiB took a quarter of a second:", time.Since(start) > 240*time.Millisecond)
	// Output: a quarter of a MiB took a quarter of a second: true
}
