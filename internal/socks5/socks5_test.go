package socks5

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

// script is a peer that has said everything already. It keeps what it is told.
type script struct {
	io.Reader
	told bytes.Buffer
}

func (s *script) Write(p []byte) (int, error) { return s.told.Write(p) }

// ways are ways in which the same bytes arrive.
var ways = []struct {
	name string
	wrap func(io.Reader) io.Reader
}{
	{"at once", func(r io.Reader) io.Reader { return r }},
	{"byte by byte", iotest.OneByteReader},
	{"with their end", iotest.DataErrReader},
	{"by halves", iotest.HalfReader},
}

const rest = "bytes that follow the handshake"

// request returns a greeting without authentication and a request with the address bytes of addr.
func request(cmd byte, addr string) string {
	return "\x05\x01\x00" + "\x05" + string(cmd) + "\x00" + addr
}

const (
	v4Addr   = "\x01\x7f\x00\x00\x01\x00\x50"
	nameAddr = "\x03\x0bexample.com\x01\xbb"
)

// named returns the address bytes of host, as a name, and port 80.
func named(host string) string { return "\x03" + string([]byte{byte(len(host))}) + host + "\x00\x50" }

func bob(user, password string) bool { return user == "bob" && password == "hunter2" }

func TestServerTakesRequests(t *testing.T) {
	const asBob = "\x01\x03bob\x07hunter2"
	tests := []struct {
		name  string
		check func(user, password string) bool
		in    string
		want  Request
		told  string
	}{
		{"IPv4", nil, request(1, v4Addr), Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"name", nil, request(1, nameAddr), Request{Connect, Addr{"example.com", 443}, ""}, "\x05\x00"},
		{"IPv6", nil, request(1, "\x04\x20\x01\x0d\xb8"+strings.Repeat("\x00", 11)+"\x01\x00\x16"),
			Request{Connect, Addr{"2001:db8::1", 22}, ""}, "\x05\x00"},
		{"IPv4 mapped into IPv6", nil, request(1, "\x04"+strings.Repeat("\x00", 10)+"\xff\xff\x01\x02\x03\x04\x00\x16"),
			Request{Connect, Addr{"1.2.3.4", 22}, ""}, "\x05\x00"},
		{"name that is an IPv4 address", nil, request(1, named("10.0.0.9")), Request{Connect, Addr{"10.0.0.9", 80}, ""}, "\x05\x00"},
		{"name that is an IPv6 address", nil, request(1, named("2001:DB8:0::9")), Request{Connect, Addr{"2001:db8::9", 80}, ""}, "\x05\x00"},
		{"name that is one in brackets", nil, request(1, named("[2001:db8::9]")), Request{Connect, Addr{"2001:db8::9", 80}, ""}, "\x05\x00"},
		{"name that is a mapped one", nil, request(1, named("::ffff:10.0.0.9")), Request{Connect, Addr{"10.0.0.9", 80}, ""}, "\x05\x00"},
		{"name of one byte", nil, request(1, named("a")), Request{Connect, Addr{"a", 80}, ""}, "\x05\x00"},
		{"longest name", nil, request(1, named(strings.Repeat("n", 255))),
			Request{Connect, Addr{strings.Repeat("n", 255), 80}, ""}, "\x05\x00"},
		{"BIND", nil, request(2, v4Addr), Request{Bind, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"UDP ASSOCIATE from anywhere", nil, request(3, "\x01\x00\x00\x00\x00\x00\x00"),
			Request{UDPAssociate, Addr{"0.0.0.0", 0}, ""}, "\x05\x00"},
		{"command that does not exist", nil, request(9, v4Addr), Request{9, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"reserved byte set", nil, "\x05\x01\x00\x05\x01\x07" + v4Addr, Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"255 methods", nil, "\x05\xff" + strings.Repeat("\x09", 254) + "\x00\x05\x01\x00" + v4Addr,
			Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"none is chosen before a password", nil, "\x05\x02\x02\x00\x05\x01\x00" + v4Addr,
			Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x00"},
		{"password that nobody asked for", nil, "\x05\x01\x02" + asBob + "\x05\x01\x00" + v4Addr,
			Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x02\x01\x00"},
		{"empty name and password", nil, "\x05\x01\x02\x01\x00\x00\x05\x01\x00" + v4Addr,
			Request{Connect, Addr{"127.0.0.1", 80}, ""}, "\x05\x02\x01\x00"},
		{"password", bob, "\x05\x02\x00\x02" + asBob + "\x05\x01\x00" + v4Addr,
			Request{Connect, Addr{"127.0.0.1", 80}, "bob"}, "\x05\x02\x01\x00"},
	}
	for _, tt := range tests {
		for _, way := range ways {
			t.Run(tt.name+"/"+way.name, func(t *testing.T) {
				in := strings.NewReader(tt.in + rest)
				peer := &script{Reader: way.wrap(in)}
				got, err := (&Server{Check: tt.check}).Handshake(peer)
				if err != nil || got != tt.want {
					t.Fatalf("got %+v, %v; want %+v", got, err, tt.want)
				}
				if peer.told.String() != tt.told {
					t.Errorf("client was told %x, want %x", peer.told.String(), tt.told)
				}
				if left, _ := io.ReadAll(peer); string(left) != rest {
					t.Errorf("left in the conn: %q, want %q", left, rest)
				}
			})
		}
	}
}

func TestServerRefuses(t *testing.T) {
	type test struct {
		name  string
		check func(user, password string) bool
		in    string
		is    error
		says  string
		told  string
	}
	const failed = "\x05\x00" + "\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"
	const httpSays = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n" +
		"This is a SOCKS5 proxy, and HTTP was spoken to it.\r\n"
	tests := []test{
		{"nothing", nil, "", io.EOF, "greeting", ""},
		{"SOCKS4", nil, "\x04\x01\x00\x50\x7f\x00\x00\x01\x00", ErrMalformed, "client speaks SOCKS4", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"TLS", nil, "\x16\x03\x01\x02\x00", ErrMalformed, "client speaks TLS", ""},
		{"version 6", nil, "\x06\x01\x00", ErrMalformed, "version 6", ""},
		{"no methods", nil, "\x05\x00", ErrMalformed, "no methods", "\x05\xff"},
		{"methods unknown", nil, "\x05\x02\x01\x80", syscall.EACCES, "no method of authentication that is known here (01 80)", "\x05\xff"},
		{"no password offered", bob, "\x05\x01\x00", syscall.EACCES, "no user name and password", "\x05\xff"},
		{"wrong password", bob, "\x05\x01\x02\x01\x03bob\x04nope", syscall.EACCES, `user "bob"`, "\x05\x02\x01\x01"},
		{"version of the password", bob, "\x05\x01\x02\x05\x03bob\x07hunter2", ErrMalformed, "version 5", "\x05\x02\x01\x01"},
		{"version of the request", nil, "\x05\x01\x00\x04\x01\x00\x50", ErrMalformed, "version 4", "\x05\x00"},
		{"address type", nil, request(1, "\x02\x00\x00"), ErrMalformed, "address type 2",
			"\x05\x00" + "\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"name of no length", nil, request(1, named("")), ErrMalformed, `"" is not the name`, failed},
	}
	for _, in := range []string{"GET / HTTP/1.1\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\n\r\n", "POST / HTTP/1.0\r\n\r\n"} {
		tests = append(tests, test{in[:4], nil, in, ErrMalformed, "client speaks HTTP", httpSays})
	}
	for _, host := range []string{"a\x00b", "a b", "a\nb", "a/b", "u@a", "[a]", "[::1", "\xff\xfe", "::1%\n", "\x7f"} {
		tests = append(tests, test{"name " + host, nil, request(1, named(host)), ErrMalformed, "not the name of a host", failed})
	}
	for _, tt := range tests {
		for _, way := range ways {
			t.Run(tt.name+"/"+way.name, func(t *testing.T) {
				peer := &script{Reader: way.wrap(strings.NewReader(tt.in))}
				got, err := (&Server{Check: tt.check}).Handshake(peer)
				if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("got %+v, %v; want one that is %v and says %q", got, err, tt.is, tt.says)
				}
				if strings.Contains(err.Error(), "nope") || strings.Contains(err.Error(), "\n") {
					t.Errorf("error gives the password away or breaks the line: %q", err)
				}
				if peer.told.String() != tt.told {
					t.Errorf("client was told %x, want %x", peer.told.String(), tt.told)
				}
			})
		}
	}
}

// Every handshake that is cut short, wherever, is io.ErrUnexpectedEOF on either half.
func TestTruncated(t *testing.T) {
	full := "\x05\x01\x02" + "\x01\x03bob\x07hunter2" + "\x05\x01\x00" + nameAddr
	turns := map[int]bool{3: true, 3 + 13: true} // where a message could have begun, io.EOF is as good
	for n := 1; n < len(full); n++ {
		_, err := (&Server{Check: bob}).Handshake(&script{Reader: strings.NewReader(full[:n])})
		if !errors.Is(err, io.ErrUnexpectedEOF) && !(turns[n] && errors.Is(err, io.EOF)) {
			t.Errorf("server, after %d bytes: %v", n, err)
		}
	}
	full = "\x05\x02" + "\x01\x00" + "\x05\x00\x00" + nameAddr
	for n := range len(full) {
		_, err := bobs.Handshake(&script{Reader: strings.NewReader(full[:n])}, Connect, Addr{"example.com", 443})
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "closed instead of answering") {
			t.Errorf("client, after %d bytes: %v", n, err)
		}
	}
}

var bobs = &Client{User: "bob", Password: "hunter2"}

func TestClient(t *testing.T) {
	const ok = "\x05\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"
	bound := Addr{"10.0.0.1", 8080}
	tests := []struct {
		name   string
		client *Client
		dst    Addr
		in     string
		bound  Addr
		told   string
	}{
		{"IPv4", &Client{}, Addr{"127.0.0.1", 80}, "\x05\x00" + ok, bound, request(1, v4Addr)},
		{"name", &Client{}, Addr{"example.com", 443}, "\x05\x00" + ok, bound, request(1, nameAddr)},
		{"IPv6", &Client{}, Addr{"::1", 80}, "\x05\x00" + ok, bound, request(1, "\x04"+strings.Repeat("\x00", 15)+"\x01\x00\x50")},
		{"IPv4 mapped into IPv6", &Client{}, Addr{"::ffff:127.0.0.1", 80}, "\x05\x00" + ok, bound, request(1, v4Addr)},
		{"bound to IPv6", &Client{}, Addr{"127.0.0.1", 80}, "\x05\x00\x05\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x00\x16",
			Addr{"::1", 22}, request(1, v4Addr)},
		{"bound to a name", &Client{}, Addr{"127.0.0.1", 80}, "\x05\x00\x05\x00\x00" + nameAddr,
			Addr{"example.com", 443}, request(1, v4Addr)},
		{"bound to a name of no length", &Client{}, Addr{"127.0.0.1", 80}, "\x05\x00\x05\x00\x00\x03\x00\x00\x16",
			Addr{"", 22}, request(1, v4Addr)},
		{"bound to what is no name", &Client{}, Addr{"127.0.0.1", 80}, "\x05\x00\x05\x00\x00\x03\x03\x00\n \x00\x16",
			Addr{"", 22}, request(1, v4Addr)},
		{"password", bobs, Addr{"127.0.0.1", 80}, "\x05\x02\x01\x00" + ok, bound,
			"\x05\x02\x00\x02" + "\x01\x03bob\x07hunter2" + "\x05\x01\x00" + v4Addr},
		{"password not asked for", bobs, Addr{"127.0.0.1", 80}, "\x05\x00" + ok, bound, "\x05\x02\x00\x02" + "\x05\x01\x00" + v4Addr},
		{"empty password", &Client{User: "bob"}, Addr{"127.0.0.1", 80}, "\x05\x02\x05\x00" + ok, bound,
			"\x05\x02\x00\x02" + "\x01\x03bob\x00" + "\x05\x01\x00" + v4Addr},
	}
	for _, tt := range tests {
		for _, way := range ways {
			t.Run(tt.name+"/"+way.name, func(t *testing.T) {
				in := strings.NewReader(tt.in + rest)
				peer := &script{Reader: way.wrap(in)}
				got, err := tt.client.Handshake(peer, Connect, tt.dst)
				if err != nil || got != tt.bound {
					t.Fatalf("got %v, %v; want %v", got, err, tt.bound)
				}
				if peer.told.String() != tt.told {
					t.Errorf("server was told %x, want %x", peer.told.String(), tt.told)
				}
				if left, _ := io.ReadAll(peer); string(left) != rest {
					t.Errorf("left in the conn: %q, want %q", left, rest)
				}
			})
		}
	}
}

func TestClientIsRefused(t *testing.T) {
	tests := []struct {
		name   string
		client *Client
		in     string
		is     error
		says   string
	}{
		{"connection refused", &Client{}, "\x05\x00\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00", syscall.ECONNREFUSED, "refused"},
		{"two bytes of a refusal", &Client{}, "\x05\x00\x05\x04", syscall.EHOSTUNREACH, "unreachable"},
		{"refusal with an address of no type", &Client{}, "\x05\x00\x05\x03\x00\x00\x00\x00", syscall.ENETUNREACH, "unreachable"},
		{"authentication wanted", &Client{}, "\x05\xff", syscall.EACCES, "give it a user name and password"},
		{"no method", bobs, "\x05\xff", syscall.EACCES, "wants another way"},
		{"wrong password", bobs, "\x05\x02\x01\x01", syscall.EACCES, "check them"},
		{"answer to the password", bobs, "\x05\x02\x00\x00", ErrMalformed, "version 0"},
		{"method not offered", &Client{}, "\x05\x02", ErrMalformed, "method 2"},
		{"HTTP", &Client{}, "HTTP/1.1 400 Bad Request\r\n", ErrMalformed, "server speaks HTTP"},
		{"SOCKS4", &Client{}, "\x00\x5b\x00\x00\x00\x00\x00\x00", ErrMalformed, "does not speak SOCKS5"},
		{"version of the reply", &Client{}, "\x05\x00\x04\x00\x00\x01\x00\x00\x00\x00\x00\x00", ErrMalformed, "version 4"},
		{"address type of the reply", &Client{}, "\x05\x00\x05\x00\x00\x07\x00\x00\x00\x00\x00\x00", ErrMalformed, "address type 7"},
	}
	for _, tt := range tests {
		for _, way := range ways {
			t.Run(tt.name+"/"+way.name, func(t *testing.T) {
				peer := &script{Reader: way.wrap(strings.NewReader(tt.in))}
				_, err := tt.client.Handshake(peer, Connect, Addr{"127.0.0.1", 80})
				if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("got %v; want one that is %v and says %q", err, tt.is, tt.says)
				}
				if strings.Contains(err.Error(), bobs.Password) {
					t.Errorf("error gives the password away: %q", err)
				}
			})
		}
	}
}

// What cannot be said in the protocol is refused before a byte is written.
func TestClientAsksForNothingItCannotSay(t *testing.T) {
	long := strings.Repeat("x", 256)
	tests := []struct {
		client Client
		host   string
	}{
		{Client{}, ""}, {Client{}, long}, {Client{}, "a\x00b"}, {Client{}, "a b"}, {Client{}, "fe80::1%eth0"},
		{Client{User: long}, "a"}, {Client{User: "u", Password: long}, "a"}, {Client{Password: "p"}, "a"},
	}
	for _, tt := range tests {
		peer := &script{Reader: strings.NewReader("\x05\x00")}
		_, err := tt.client.Handshake(peer, Connect, Addr{tt.host, 80})
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) || peer.told.Len() > 0 {
			t.Errorf("%.20q as %.20q: %v, and %x was written", tt.host, tt.client.User, err, peer.told.String())
		}
	}
}

func TestReplyEqualsErrno(t *testing.T) {
	all := []error{syscall.EACCES, syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ECONNREFUSED, syscall.ETIMEDOUT,
		syscall.EOPNOTSUPP, syscall.EAFNOSUPPORT, errors.ErrUnsupported, fs.ErrPermission, io.EOF}
	want := map[Reply][]error{
		NotAllowed: {syscall.EACCES, fs.ErrPermission}, NetworkUnreachable: {syscall.ENETUNREACH},
		HostUnreachable: {syscall.EHOSTUNREACH}, ConnectionRefused: {syscall.ECONNREFUSED},
		TTLExpired: {syscall.ETIMEDOUT}, CommandUnsupported: {syscall.EOPNOTSUPP, errors.ErrUnsupported},
		AddressUnsupported: {syscall.EAFNOSUPPORT},
	}
	for i := range 256 {
		r := Reply(i)
		for _, target := range all {
			is := false
			for _, w := range want[r] {
				is = is || w == target
			}
			if errors.Is(r, target) != is {
				t.Errorf("errors.Is(%v, %v) = %v", r, target, !is)
			}
		}
		if !errors.Is(r, r) || r.Error() == "" {
			t.Errorf("reply %d is not itself", i)
		}
	}
}

func TestWriteReply(t *testing.T) {
	tests := []struct{ bound, want string }{
		{"", "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"10.0.0.1:8080", "\x05\x05\x00\x01\x0a\x00\x00\x01\x1f\x90"},
		{"[::ffff:10.0.0.1]:8080", "\x05\x05\x00\x01\x0a\x00\x00\x01\x1f\x90"},
		{"[::1%lo]:22", "\x05\x05\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x00\x16"},
	}
	for _, tt := range tests {
		bound, _ := netip.ParseAddrPort(tt.bound)
		var b bytes.Buffer
		if err := WriteReply(&b, ConnectionRefused, bound); err != nil || b.String() != tt.want {
			t.Errorf("%s: %x, %v; want %x", tt.bound, b.String(), err, tt.want)
		}
	}
	if err := WriteReply(brokenWriter{}, Succeeded, netip.AddrPort{}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("broken conn: %v", err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// A handshake that arrives at once takes as many reads as it has turns, and two for the address,
// whose length stands in it.
func TestReads(t *testing.T) {
	// Each turn of a client that waits for answers arrives by itself.
	turns := []string{"\x05\x02\x00\x02", "\x01\x03bob\x07hunter2", "\x05\x01\x00" + nameAddr}
	reads := 0
	next := readFunc(func(p []byte) (int, error) {
		if len(turns) == 0 {
			return 0, io.EOF
		}
		reads++
		n := copy(p, turns[0])
		if turns[0] = turns[0][n:]; turns[0] == "" {
			turns = turns[1:]
		}
		return n, nil
	})
	if _, err := (&Server{Check: bob}).Handshake(&script{Reader: next}); err != nil {
		t.Fatal(err)
	}
	if reads > 2+3+2 {
		t.Errorf("%d reads", reads)
	}
}

type readFunc func(p []byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }
