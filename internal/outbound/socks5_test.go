package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/socks5"
)

// socks5Server returns the server half of an upstream that answers each request with reply and then with
// what answer has, in one segment, and echoes.
func socks5Server(reply socks5.Reply, answer string, check func(user, password string) bool) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := (&socks5.Server{Check: check}).Handshake(c); err != nil {
			return
		}
		io.WriteString(c, "\x05"+string([]byte{byte(reply)})+"\x00\x01\x00\x00\x00\x00\x00\x00"+answer)
		if reply == socks5.Succeeded {
			proxytest.Echo(c)
		}
	}
}

func TestSOCKS5ConnIsBare(t *testing.T) {
	proxytest.NoLeaks(t)
	up := proxytest.Listen(t, "tcp", socks5Server(socks5.Succeeded, "banner", nil))
	ctx, cancel := context.WithCancel(t.Context())
	c, err := (&SOCKS5{Server: up.Addr}).DialStream(ctx, proxy.TCP("example.com", 25))
	cancel() // of the dial's context, after the dial: the conn has nothing to do with it any more
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		t.Fatalf("got a %T", c)
	}
	io.WriteString(tcp, ", echo")
	tcp.CloseWrite()
	if got, err := io.ReadAll(tcp); string(got) != "banner, echo" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// The error says which hop it was, and the reason is the same for each.
func TestSOCKS5SaysWhichHop(t *testing.T) {
	bob := func(user, password string) bool { return user == "bob" && password == "hunter2" }
	html := func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); proxytest.Sink(c) }
	tests := []struct {
		name   string
		serve  func(net.Conn) // nil: nobody listens
		dialer SOCKS5
		reason proxy.Reason
		says   string
	}{
		{"no proxy", nil, SOCKS5{}, proxy.Refused, "PROXY: proxy unreachable: "},
		{"origin refused", socks5Server(5, "", nil), SOCKS5{}, proxy.Refused, "PROXY: origin example.com:80: socks5: connection refused"},
		{"denied", socks5Server(2, "", nil), SOCKS5{}, proxy.Denied, "PROXY: origin example.com:80: socks5: not allowed"},
		{"network", socks5Server(3, "", nil), SOCKS5{}, proxy.NetUnreachable, "PROXY: origin example.com:80: "},
		{"host", socks5Server(4, "", nil), SOCKS5{}, proxy.HostUnreachable, "PROXY: origin example.com:80: "},
		{"timeout", socks5Server(6, "", nil), SOCKS5{}, proxy.Timeout, "PROXY: origin example.com:80: "},
		{"command", socks5Server(7, "", nil), SOCKS5{}, proxy.Unsupported, "PROXY: origin example.com:80: "},
		{"address", socks5Server(8, "", nil), SOCKS5{}, proxy.Unsupported, "PROXY: origin example.com:80: "},
		{"general", socks5Server(1, "", nil), SOCKS5{}, proxy.Other, "PROXY: origin example.com:80: "},
		{"password wanted", socks5Server(0, "", bob), SOCKS5{}, proxy.Denied, "PROXY: socks5: the proxy wants authentication"},
		{"password wrong", socks5Server(0, "", bob), SOCKS5{User: "bob", Password: "secret"}, proxy.Denied,
			"PROXY: socks5: the proxy refused the user name or password"},
		{"not SOCKS", html, SOCKS5{}, proxy.Other, "PROXY: socks5: malformed answer: server speaks HTTP"},
		{"closes", func(net.Conn) {}, SOCKS5{}, proxy.Reset, "PROXY: socks5: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			tt.dialer.Server = proxy.TCP("127.0.0.1", proxytest.FreePort(t))
			if tt.serve != nil {
				tt.dialer.Server = proxytest.Listen(t, "tcp", tt.serve).Addr
			}
			_, err := tt.dialer.DialStream(t.Context(), proxy.TCP("example.com", 80))
			if proxy.ReasonOf(err) != tt.reason {
				t.Errorf("%v: %v, want %v", proxy.ReasonOf(err), err, tt.reason)
			}
			says := "outbound: socks5 " + strings.Replace(tt.says, "PROXY", tt.dialer.Server.String(), 1)
			if err == nil || !strings.HasPrefix(err.Error(), says) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v; want %q", err, says)
			}
		})
	}
	d := &SOCKS5{Server: proxy.TCP("127.0.0.1", 1)}
	if _, err := d.DialStream(t.Context(), proxy.Addr{Network: "unix", Host: "/x"}); proxy.ReasonOf(err) != proxy.Unsupported {
		t.Errorf("Unix socket: %v", err)
	}
}

// The end of the context ends the dial in each of its phases, and leaves nothing behind: the bubble of
// synctest ends only when no goroutine is left in it.
func TestSOCKS5ContextEndsDial(t *testing.T) {
	phases := map[string]string{
		"greeting":            "",
		"half a method":       "\x05",
		"user name, password": "\x05\x02",
		"request":             "\x05\x00",
		"half a reply":        "\x05\x00\x05\x00\x00\x03\xffx",
	}
	ends := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"timeout": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 5*time.Second)
		},
		"canceled": func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(5*time.Second, cancel)
			return ctx, cancel
		},
	}
	for phase, says := range phases {
		for end, with := range ends {
			for _, deaf := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/deaf=%v", phase, end, deaf), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						near, far := net.Pipe()
						defer far.Close()
						done := make(chan bool)
						go func() {
							if !deaf {
								go io.Copy(io.Discard, far)
							}
							io.WriteString(far, says)
							close(done)
						}()
						ctx, cancel := with(t.Context())
						defer cancel()
						via := &proxytest.ScriptedDialer{Script: func(context.Context, proxy.Addr) (net.Conn, error) { return near, nil }}
						begin := time.Now()
						_, err := (&SOCKS5{User: "u", Via: via}).DialStream(ctx, proxy.TCP("example.com", 80))
						if d := time.Since(begin); d != 5*time.Second || proxy.ReasonOf(err).String() != end {
							t.Errorf("after %v: %v (%v)", d, err, proxy.ReasonOf(err))
						}
						<-done
						if _, err := near.Write(nil); !errors.Is(err, io.ErrClosedPipe) {
							t.Errorf("conn is not closed: %v", err)
						}
					})
				})
			}
		}
	}
}

// A context that ends while the last byte arrives gives either a conn or an error, and never a conn that
// is closed.
func TestSOCKS5ContextEndsAsDialSucceeds(t *testing.T) {
	proxytest.NoLeaks(t)
	up := proxytest.Listen(t, "tcp", socks5Server(socks5.Succeeded, "", nil))
	conns := 0
	for i := range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*5*time.Microsecond)
		c, err := (&SOCKS5{Server: up.Addr}).DialStream(ctx, proxy.TCP("example.com", 80))
		cancel()
		if err != nil {
			if proxy.ReasonOf(err) != proxy.Timeout {
				t.Errorf("%v: %v", proxy.ReasonOf(err), err)
			}
			continue
		}
		conns++
		io.WriteString(c, "x")
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Errorf("the conn does not live: %v", err)
		}
		c.Close()
	}
	t.Logf("%d of 200 dials were in time", conns)
}

func startMicrosocks(t *testing.T, args ...string) proxy.Addr {
	port := proxytest.FreePort(t)
	a := proxy.TCP("127.0.0.1", port)
	proxytest.Start(t, a.HostPort(), "microsocks", append(args, "-i", "127.0.0.1", "-p", fmt.Sprint(port))...)
	return a
}

// startDanted starts Dante with the rights that the test has. It knows no users but the system's, so
// that it is asked without a password here.
func startDanted(t *testing.T, _ ...string) proxy.Addr {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	a := proxy.TCP("127.0.0.1", proxytest.FreePort(t))
	dir := t.TempDir()
	config := filepath.Join(dir, "danted.conf")
	err = os.WriteFile(config, fmt.Appendf(nil, `
logoutput: stderr
internal: 127.0.0.1 port = %d
external.protocol: ipv4 ipv6
external: lo
user.privileged: %s
user.unprivileged: %[2]s
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 }
socks block { from: 0/0 to: 127.0.0.7/32 }
socks pass { from: 0/0 to: 0/0 }
`, a.Port, me.Username), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	proxytest.Start(t, a.HostPort(), "danted", "-f", config, "-p", filepath.Join(dir, "pid"), "-N", "1")
	return a
}

func TestSOCKS5ThroughOthers(t *testing.T) {
	for _, up := range []struct {
		program      string
		withPassword bool
		start        func(t *testing.T, args ...string) proxy.Addr
		args         []string
	}{
		{"microsocks", false, startMicrosocks, nil},
		{"microsocks", true, startMicrosocks, []string{"-u", "ann", "-P", "secret"}},
		{"danted", false, startDanted, nil},
	} {
		t.Run(fmt.Sprintf("%s/password=%v", up.program, up.withPassword), func(t *testing.T) {
			proxytest.Need(t, up.program)
			proxytest.NoLeaks(t)
			v4 := proxytest.Listen(t, "tcp", proxytest.Echo).Addr
			v6 := proxytest.Listen(t, "tcp6", proxytest.Echo).Addr
			d := &SOCKS5{Server: up.start(t, up.args...)}
			if up.withPassword {
				if _, err := d.DialStream(t.Context(), v4); proxy.ReasonOf(err) != proxy.Denied {
					t.Errorf("without the password: %v", err)
				}
				d.User, d.Password = "ann", "wrong"
				if _, err := d.DialStream(t.Context(), v4); proxy.ReasonOf(err) != proxy.Denied {
					t.Errorf("with the wrong password: %v", err)
				}
				d.Password = "secret"
			}
			mapped := proxy.TCP(netip.MustParseAddr("::ffff:127.0.0.1").String(), v4.Port)
			for _, dst := range []proxy.Addr{v4, v6, mapped, proxy.TCP("localhost", v4.Port)} {
				c, err := d.DialStream(t.Context(), dst)
				if err != nil {
					t.Errorf("%v: %v", dst, err)
					continue
				}
				ask(t, c)
			}
			// The second hop is reached through the first.
			chain := &SOCKS5{Server: up.start(t, up.args...), User: d.User, Password: d.Password, Via: d}
			c, err := chain.DialStream(t.Context(), v4)
			if err != nil {
				t.Fatal(err)
			}
			ask(t, c)
			_, err = chain.DialStream(t.Context(), proxy.TCP("127.0.0.1", proxytest.FreePort(t)))
			if proxy.ReasonOf(err) != proxy.Refused || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("refused by the origin: %v", err)
			}
			_, err = d.DialStream(t.Context(), proxy.TCP("name.invalid", 80))
			if _, isReply := errors.AsType[socks5.Reply](err); !isReply {
				t.Errorf("name that does not exist: %v", err)
			}
			if up.program == "danted" {
				_, err = d.DialStream(t.Context(), proxy.TCP("127.0.0.7", v4.Port))
				if proxy.ReasonOf(err) != proxy.Denied {
					t.Errorf("denied by its rules: %v", err)
				}
			}
		})
	}
}

// ask sends a question to an origin that echoes. It does not half-close, which microsocks takes for the end.
func ask(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	got := make([]byte, len("question"))
	io.WriteString(c, "question")
	if _, err := io.ReadFull(c, got); string(got) != "question" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, ok := c.(*net.TCPConn); !ok {
		t.Errorf("got a %T", c)
	}
}
