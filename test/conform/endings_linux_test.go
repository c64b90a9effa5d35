package conform

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// The words by which a client tells the origin how to end. The origin answers each with a '+'.
const (
	echoes = 'e' // to the client's end, and then ends
	closes = 'c' // at the client's next byte
	resets = 'r' // at the client's next byte
	floods = 'f' // until it is told that nobody reads
	sinks  = 's' // half-closes, and reads to the client's end
)

// small is the size of socket buffers that a flood soon fills: of hundreds the kernel would hold gigabytes.
const small = 64 << 10

func obey(c net.Conn) {
	word := make([]byte, 1)
	if _, err := io.ReadFull(c, word); err != nil {
		return
	}
	_, err := io.WriteString(c, "+")
	switch word[0] {
	case echoes:
		proxytest.Echo(c)
	case closes:
		c.Read(word)
	case resets:
		proxytest.Abort(c)
	case floods:
		c.(*net.TCPConn).SetWriteBuffer(small)
		for b := make([]byte, small); err == nil; {
			_, err = c.Write(b)
		}
	case sinks:
		closeWrite(c)
		proxytest.Sink(c)
	}
}

// endings are the ways in which a client's connection ends. All say to the origin that word at first.
var endings = []struct {
	name string
	word string // empty: the origin is never reached
	end  func(c net.Conn) error
}{
	{"clean", "e", func(c net.Conn) error { return nil }},
	{"half-closed", "e", func(c net.Conn) error {
		_, err := io.WriteString(c, "last words")
		closeWrite(c)
		return errors.Join(err, hear(c, "last words"))
	}},
	{"half-closed by the origin", "s", func(c net.Conn) error {
		err := hear(c, "")
		_, werr := io.WriteString(c, "last words")
		return errors.Join(err, werr)
	}},
	{"closed by the origin", "c", func(c net.Conn) error {
		io.WriteString(c, "x")
		return hear(c, "")
	}},
	{"reset", "e", func(c net.Conn) error { return relay.Abort(c) }},
	{"reset by the origin", "r", func(c net.Conn) error {
		io.WriteString(c, "x")
		if !proxytest.Resets(c) {
			return errors.New("no reset")
		}
		return nil
	}},
	{"closed in the middle", "f", func(c net.Conn) error { return nil }},
	{"reset in the middle", "f", func(c net.Conn) error { return relay.Abort(c) }},
	{"reset after a half-close", "f", func(c net.Conn) error {
		closeWrite(c)
		return relay.Abort(c)
	}},
	{"abandoned dial", "", func(c net.Conn) error { return relay.Abort(c) }},
}

func hear(c net.Conn, want string) error {
	b, err := io.ReadAll(c)
	if err == nil && string(b) != want {
		err = fmt.Errorf("read %q, not %q", b, want)
	}
	return err
}

// A thousand connections at a time that end in all these ways leave nothing behind.
func TestEndings(t *testing.T) {
	const connections = 1000
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			origin := proxytest.Listen(t, "tcp", obey)
			silent := blackHole(t)
			d := &outbound.Direct{}
			answered := start(t, setup{protocol: p, to: origin.Addr, dialer: d})
			unanswered := start(t, setup{protocol: p, to: silent, dialer: d, dialTimeout: 2 * proxytest.Patience})

			var open, all sync.WaitGroup
			open.Add(connections)
			end := make(chan struct{})
			for i := range connections {
				e := endings[i%len(endings)]
				all.Go(func() {
					c, err := opened(p, e.word, answered, unanswered, origin.Addr, silent)
					open.Done()
					if err != nil {
						t.Errorf("%s: %v", e.name, err)
						return
					}
					defer c.Close()
					<-end
					c.SetDeadline(time.Now().Add(proxytest.Patience))
					if err := e.end(c); err != nil {
						t.Errorf("%s: %v", e.name, err)
					}
				})
			}
			open.Wait()
			sessions := func() int { return answered.engine.Sessions() + unanswered.engine.Sessions() }
			proxytest.Until(t, "all sessions are there", func() bool { return t.Failed() || sessions() == connections })
			close(end)
			all.Wait()
			proxytest.Until(t, "no session is left", func() bool { return sessions() == 0 })
		})
	}
}

// opened opens a connection and has the origin obey word, or, if it is empty, one that cannot be reached.
func opened(p protocol, word string, answered, unanswered *sluice, origin, silent proxy.Addr) (net.Conn, error) {
	s, dst := answered, origin
	if word == "" {
		s, dst = unanswered, silent
	}
	c, err := net.Dial("tcp", s.addr.HostPort())
	if err != nil {
		return nil, err
	}
	c.(*net.TCPConn).SetReadBuffer(small)
	c.SetDeadline(time.Now().Add(2 * proxytest.Patience))
	if _, err = io.WriteString(c, p.request(dst)+word); err == nil && word != "" {
		plus := make([]byte, 1)
		if err = p.hearYes(c); err == nil {
			_, err = io.ReadFull(c, plus)
		}
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
