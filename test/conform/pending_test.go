package conform

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// eachWay runs f for each protocol, over TCP through each upstream, and over a Unix socket. The setup has the
// protocol and the network; f adds the rest.
func eachWay(t *testing.T, f func(t *testing.T, s setup, via int)) {
	for _, p := range protocols {
		for via := range upstreams {
			t.Run(p.name+"/"+upstreams[via].name, func(t *testing.T) {
				proxytest.NoLeaks(t)
				f(t, setup{protocol: p, network: "tcp"}, via)
			})
		}
		t.Run(p.name+"/unix", func(t *testing.T) {
			proxytest.NoLeaks(t)
			f(t, setup{protocol: p, network: "unix"}, 0)
		})
	}
}

// What a client sends behind its request, and its end, before its destination has been reached, is kept and
// passed on. It does not matter in what pieces all of that comes.
func TestEarlyData(t *testing.T) {
	const early = "early bytes"
	writes := map[string]func(io.Writer, string) error{
		"at once": func(w io.Writer, s string) error {
			_, err := io.WriteString(w, s)
			return err
		},
		"byte by byte": func(w io.Writer, s string) error {
			for i := range len(s) {
				if _, err := io.WriteString(w, s[i:i+1]); err != nil {
					return err
				}
				time.Sleep(200 * time.Microsecond) // so that bytes are read one by one
			}
			return nil
		},
	}
	origin := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(b []byte) []byte { return append(b, " answered"...) }))
	eachWay(t, func(t *testing.T, s setup, via int) {
		for name, write := range writes {
			for _, endsEarly := range []bool{true, false} {
				g := newGate(&outbound.Direct{})
				last := s
				last.to, last.dialer = origin.Addr, g
				s := last
				s.dialer, _ = upstreams[via].start(t, last)
				c := proxytest.Dial(t, start(t, s).addr)
				if err := write(c, s.protocol.request(origin.Addr)+early); err != nil {
					t.Fatal(err)
				}
				within(t, "the origin is dialled", g.waiting)
				if endsEarly {
					closeWrite(c)
				}
				close(g.open)
				if err := s.protocol.hearYes(c); err != nil {
					t.Fatal(err)
				}
				if !endsEarly {
					closeWrite(c)
				}
				if b, err := io.ReadAll(c); string(b) != early+" answered" || err != nil {
					t.Errorf("%s, ends early: %v: read %q, %v", name, endsEarly, b, err)
				}
			}
		}
	})
}

// leaving are the ways in which a client says that it does not want the answer any more.
var leaving = map[string]func(net.Conn){
	"reset":                    func(c net.Conn) { relay.Abort(c) },
	"half-close and reset":     func(c net.Conn) { closeWrite(c); time.Sleep(50 * time.Millisecond); relay.Abort(c) },
	"early bytes and reset":    func(c net.Conn) { io.WriteString(c, "early"); relay.Abort(c) },
	"reset, after some while":  func(c net.Conn) { time.Sleep(50 * time.Millisecond); relay.Abort(c) },
	"bytes and end, and reset": func(c net.Conn) { io.WriteString(c, "early"); closeWrite(c); relay.Abort(c) },
}

// A client that resets its conn while its destination is being dialled ends the dial, also where it is
// another sluice that dials.
func TestResetCancelsTheDial(t *testing.T) {
	origin := proxytest.Listen(t, "tcp", proxytest.Sink)
	eachWay(t, func(t *testing.T, s setup, via int) {
		if s.network == "unix" {
			return // it has no reset
		}
		for name, leave := range leaving {
			g := newGate(&outbound.Direct{})
			last := s
			last.to, last.dialer, last.dialTimeout = origin.Addr, g, 2*proxytest.Patience
			s := last
			var up *sluice
			s.dialer, up = upstreams[via].start(t, last)
			first := start(t, s)
			c := proxytest.Dial(t, first.addr)
			if _, err := io.WriteString(c, s.protocol.request(origin.Addr)); err != nil {
				t.Fatal(err)
			}
			within(t, "the origin is dialled", g.waiting)
			leave(c)
			if err := within(t, name+": the dial is given up", g.gone); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: the dial is given up because of %v", name, err)
			}
			proxytest.Until(t, "the session is over", func() bool {
				return first.engine.Sessions() == 0 && (up == nil || up.engine.Sessions() == 0)
			})
		}
	})
	if origin.Accepted() > 0 {
		t.Errorf("the origin was dialled %d times", origin.Accepted())
	}
}
