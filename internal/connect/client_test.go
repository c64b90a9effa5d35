package connect

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReader(r) }

func TestWriteRequest(t *testing.T) {
	var b bytes.Buffer
	if err := WriteRequest(&b, "example.com", 443, "user", "pass:word"); err != nil {
		t.Fatal(err)
	}
	// Another reader than our own says what it is.
	r, err := http.ReadRequest(newReader(bytes.NewReader(b.Bytes())))
	if err != nil || r.Method != "CONNECT" || r.RequestURI != "example.com:443" || r.Host != "example.com:443" ||
		r.Header.Get("Proxy-Authorization") != "Basic dXNlcjpwYXNzOndvcmQ=" || len(r.Header) != 1 {
		t.Fatalf("%q is read as %+v, %v", b.Bytes(), r, err)
	}
	for _, tt := range []struct {
		host string
		port uint16
		user string
	}{
		{"", 443, ""}, {"a b", 443, ""}, {"a\r\nX: y", 443, ""}, {"example.com", 0, ""}, {"example.com", 443, "a:b"},
	} {
		b.Reset()
		if err := WriteRequest(&b, tt.host, tt.port, tt.user, ""); err == nil || b.Len() > 0 {
			t.Errorf("%+v: wrote %q, %v", tt, b.Bytes(), err)
		}
	}
}

func TestReadResponse(t *testing.T) {
	for _, head := range []string{
		"HTTP/1.1 200 Connection established\r\n\r\n",
		"HTTP/1.0 200 OK\n\n",
		"HTTP/1.1 200 \r\n\r\n",
		"HTTP/1.1 204\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n", // to be ignored
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1 200 OK\r\nodd line\r\n folded\r\n\r\n",
	} {
		const early = "\r\n\r\nearly\x00"
		rest, err := ReadResponse(strings.NewReader(head + early))
		if err != nil || string(rest) != early {
			t.Errorf("%q: got %q, %v", head, rest, err)
		}
		r := strings.NewReader(head + early)
		rest, err = ReadResponse(iotest.OneByteReader(r))
		if left, _ := io.ReadAll(r); err != nil || string(rest)+string(left) != early {
			t.Errorf("%q byte by byte: got %q and %q, %v", head, rest, left, err)
		}
	}
}

func TestReadResponseRefused(t *testing.T) {
	for _, tt := range []struct {
		head string
		want error // nil: no errno
	}{
		{"HTTP/1.1 502 Bad Gateway\r\nProxy-Status: sluice; error=connection_refused\r\n\r\n", syscall.ECONNREFUSED},
		{"HTTP/1.1 504 x\r\nproxy-status: \"a, b;error=dns_error\"; a=b, c; error=dns_error;details=\"no \\\"x\\\"\", d;error=tls_alert_received\r\n\r\n", syscall.ENOENT},
		{"HTTP/1.1 502 x\r\nProxy-Status: sluice; error=tls_certificate_error\r\n\r\n", syscall.EHOSTUNREACH},
		{"HTTP/1.1 502 x\r\n\r\n", syscall.EHOSTUNREACH},
		{"HTTP/1.1 503\r\n\r\n", syscall.EHOSTUNREACH},
		{"HTTP/1.1 504 x\r\n\r\n", syscall.ETIMEDOUT},
		{"HTTP/1.1 401 x\r\n\r\n", syscall.EACCES},
		{"HTTP/1.1 403 x\r\n\r\n", syscall.EACCES},
		{"HTTP/1.1 407 x\r\n\r\n", syscall.EACCES},
		{"HTTP/1.1 405 x\r\n\r\n", errors.ErrUnsupported},
		{"HTTP/1.1 501 x\r\n\r\n", errors.ErrUnsupported},
		{"HTTP/1.1 404 x\r\n\r\n", nil},
		{"HTTP/1.1 302 x\r\n\r\n", nil},
	} {
		_, err := ReadResponse(strings.NewReader(tt.head))
		e, ok := errors.AsType[*StatusError](err)
		if !ok {
			t.Errorf("%q: got %v", tt.head, err)
			continue
		}
		for _, errno := range []error{syscall.ECONNREFUSED, syscall.ENOENT, syscall.EHOSTUNREACH, syscall.ETIMEDOUT,
			syscall.EACCES, errors.ErrUnsupported} {
			if errors.Is(e, errno) != (errno == tt.want) {
				t.Errorf("%q: is %v: %v, want %v", tt.head, errno, errors.Is(e, errno), tt.want)
			}
		}
	}
	_, err := ReadResponse(strings.NewReader("HTTP/1.1 502 x\r\nProxy-Status: a;error=dns_error;details=\"no \\\"x\\\"\"\r\n\r\n"))
	if e, ok := errors.AsType[*StatusError](err); !ok || e.Details != `no "x"` || e.ProxyStatus != "dns_error" {
		t.Errorf("got %+v", e)
	}
}

func TestReadResponseMalformed(t *testing.T) {
	for _, in := range []string{
		"SSH-2.0-OpenSSH_10.0\r\n",
		"\x05\x00",
		"HTTP/2 200\r\n\r\n",
		"HTTP/1.1 20 OK\r\n\r\n",
		"HTTP/1.1 099 OK\r\n\r\n",
		"HTTP/1.1 2000 OK\r\n\r\n",
		"HTTP/1.1\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
		"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", MaxHead) + "\r\n\r\n",
		strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 1000),
	} {
		// The reader goes on for ever: the answer must be known to be none without its end.
		r := io.MultiReader(strings.NewReader(in), stuck{t})
		if _, err := ReadResponse(r); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%.40q: got %v", in, err)
		}
	}
	for _, in := range []string{"", "HT", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 100 Continue\r\n\r\n"} {
		if _, err := ReadResponse(strings.NewReader(in)); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q and the end: got %v", in, err)
		}
	}
}

type stuck struct{ t *testing.T }

func (s stuck) Read([]byte) (int, error) {
	s.t.Fatal("reads on")
	return 0, io.EOF
}

func TestStatusErrorIsPrintable(t *testing.T) {
	e := &StatusError{Code: 502, Status: "502 \x1b[31m", ProxyStatus: "dns_error", Details: "\xff\x07"}
	for _, c := range []byte(e.Error()) {
		if c < ' ' || c >= 0x7f {
			t.Errorf("%q", e.Error())
		}
	}
}
