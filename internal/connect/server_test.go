package connect

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReadRequest(t *testing.T) {
	want := Request{Host: "example.com", Port: 443}
	auth := Request{Host: "example.com", Port: 443, User: "user", Password: "pass:word", HasUser: true}
	for _, tt := range []struct {
		name, in string
		want     Request
	}{
		{"plain", "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", want},
		{"no headers", "CONNECT example.com:443 HTTP/1.0\r\n\r\n", want},
		{"bare LF", "CONNECT example.com:443 HTTP/1.1\nHost: x\n\n", want},
		{"mixed ends", "CONNECT example.com:443 HTTP/1.1\nHost: x\r\n\n", want},
		{"content of no length", "CONNECT example.com:443 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", want},
		{"IPv6", "CONNECT [2001:db8::1]:22 HTTP/1.1\r\n\r\n", Request{Host: "2001:db8::1", Port: 22}},
		{"IPv4", "CONNECT 192.0.2.1:22 HTTP/1.1\r\n\r\n", Request{Host: "192.0.2.1", Port: 22}},
		{"Basic", "CONNECT example.com:443 HTTP/1.1\r\nproxy-authorization:  basic  dXNlcjpwYXNzOndvcmQ= \r\n\r\n", auth},
		{"Bearer", "CONNECT example.com:443 HTTP/1.1\r\nProxy-Authorization: Bearer xyz\r\n\r\n", want},
		{"broken base64", "CONNECT example.com:443 HTTP/1.1\r\nProxy-Authorization: Basic dXN\r\n\r\n", want},
		{"no colon", "CONNECT example.com:443 HTTP/1.1\r\nProxy-Authorization: Basic dXNlcg==\r\n\r\n",
			Request{Host: "example.com", Port: 443, User: "user"}},
		{"nearly too long", "CONNECT example.com:443 HTTP/1.1\r\nX: " +
			strings.Repeat("x", MaxHead-len("CONNECT example.com:443 HTTP/1.1\r\nX: \r\n\r\n")) + "\r\n\r\n", want},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const early = "\r\n\r\nearly\x00"
			for split := 0; split <= len(tt.in); split += max(1, len(tt.in)/97) {
				got, rest, err := ReadRequest(strings.NewReader(tt.in[split:]+early), []byte(tt.in[:split]))
				if err != nil || got != tt.want {
					t.Fatalf("%d read before: got %+v, %v; want %+v", split, got, err, tt.want)
				}
				if !strings.HasPrefix(early, string(rest)) {
					t.Fatalf("%d read before: bytes behind the head: %q", split, rest)
				}
			}
			all := tt.in + early
			r := strings.NewReader(all)
			got, rest, err := ReadRequest(iotest.OneByteReader(r), nil)
			if err != nil || got != tt.want || len(rest) != 0 || r.Len() != len(early) {
				t.Fatalf("byte by byte: got %+v, %q and %d more, %v", got, rest, r.Len(), err)
			}
			got, rest, err = ReadRequest(strings.NewReader(""), []byte(all))
			if err != nil || got != tt.want || string(rest) != early {
				t.Fatalf("all read before: got %+v, %q, %v", got, rest, err)
			}
		})
	}
}

func TestReadRequestRefuses(t *testing.T) {
	const ok = "CONNECT example.com:443 HTTP/1.1\r\n"
	for _, tt := range []struct {
		name, in string
		code     int
	}{
		{"other method", "GET http://example.com/ HTTP/1.1\r\n\r\n", 405},
		{"lower case", "connect example.com:443 HTTP/1.1\r\n\r\n", 405},
		{"empty line", "\r\n\r\n", 400},
		{"no version", "CONNECT example.com:443\r\n\r\n", 400},
		{"two spaces", "CONNECT  example.com:443 HTTP/1.1\r\n\r\n", 400},
		{"space behind", ok[:len(ok)-2] + " \r\n\r\n", 505},
		{"HTTP/2", "CONNECT example.com:443 HTTP/2.0\r\n\r\n", 505},
		{"not HTTP", "CONNECT example.com:443 FTP/1.1\r\n\r\n", 400},
		{"missing port", "CONNECT example.com HTTP/1.1\r\n\r\n", 400},
		{"empty port", "CONNECT example.com: HTTP/1.1\r\n\r\n", 400},
		{"port 0", "CONNECT example.com:0 HTTP/1.1\r\n\r\n", 400},
		{"port too large", "CONNECT example.com:65536 HTTP/1.1\r\n\r\n", 400},
		{"port with sign", "CONNECT example.com:+443 HTTP/1.1\r\n\r\n", 400},
		{"port by name", "CONNECT example.com:https HTTP/1.1\r\n\r\n", 400},
		{"missing host", "CONNECT :443 HTTP/1.1\r\n\r\n", 400},
		{"host too long", "CONNECT " + strings.Repeat("a", 256) + ":443 HTTP/1.1\r\n\r\n", 400},
		{"URL", "CONNECT http://example.com:443/ HTTP/1.1\r\n\r\n", 400},
		{"user in target", "CONNECT me@example.com:443 HTTP/1.1\r\n\r\n", 400},
		{"IPv6 without brackets", "CONNECT 2001:db8::1:443 HTTP/1.1\r\n\r\n", 400},
		{"name in brackets", "CONNECT [example.com]:443 HTTP/1.1\r\n\r\n", 400},
		{"folded header", ok + "A: b\r\n c\r\n\r\n", 400},
		{"folded first header", ok + " A: b\r\n\r\n", 400},
		{"space before the colon", ok + "Host : x\r\n\r\n", 400},
		{"header without colon", ok + "Host\r\n\r\n", 400},
		{"header without name", ok + ": x\r\n\r\n", 400},
		{"CR in a header", ok + "A: b\rc\r\n\r\n", 400},
		{"NUL in a header", ok + "A: b\x00c\r\n\r\n", 400},
		{"two hosts", ok + "Host: a\r\nHOST: a\r\n\r\n", 400},
		{"two authorizations", ok + "Proxy-Authorization: Basic YTpi\r\nProxy-Authorization: Basic YTpi\r\n\r\n", 400},
		{"content", ok + "Content-Length: 3\r\n\r\nabc", 400},
		{"content of strange length", ok + "Content-Length: -0\r\n\r\nabc", 400},
		{"chunked", ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"too long", ok + "A: " + strings.Repeat("x", MaxHead) + "\r\n\r\n", 431},
		{"too many", ok + strings.Repeat("A: b\r\n", MaxHead/6) + "\r\n", 431},
		{"endless", strings.Repeat("C", 4*MaxHead), 431},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(tt.in), iotest.OneByteReader(strings.NewReader(tt.in))} {
				_, _, err := ReadRequest(r, nil)
				e, ok := errors.AsType[*RequestError](err)
				if !ok || e.Code != tt.code {
					t.Fatalf("got %v; want a RequestError with code %d", err, tt.code)
				}
				if answer, ok := RefusalOf(err); !ok || answer.Code != tt.code || answer.Text == "" {
					t.Fatalf("answer %+v, %v", answer, ok)
				}
			}
		})
	}
}

func TestReadRequestPassesErrorsOn(t *testing.T) {
	const head = "CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r"
	for n := range len(head) + 1 {
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if _, _, err := ReadRequest(strings.NewReader(head[:n]), nil); err != want {
			t.Errorf("EOF after %d bytes: got %v, want %v", n, err, want)
		}
		if _, _, err := ReadRequest(iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(head))), nil); err != iotest.ErrTimeout {
			t.Errorf("got %v, want %v", err, iotest.ErrTimeout)
		}
	}
	if _, ok := RefusalOf(io.ErrUnexpectedEOF); ok {
		t.Error("an answer to a client that left")
	}
}

func TestWriteRefusal(t *testing.T) {
	for _, tt := range []struct {
		r            Refusal
		status, auth string
	}{
		{Refusal{502, "connection_refused", "sluice: nobody listens there."}, "sluice; error=connection_refused", ""},
		{Refusal{407, "", "sluice: who are you?"}, "", Challenge},
	} {
		var b bytes.Buffer
		if err := WriteRefusal(&b, tt.r); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(newReader(&b), &http.Request{Method: "CONNECT"})
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != tt.r.Code || string(body) != tt.r.Text+"\n" || !resp.Close ||
			resp.Header.Get("Proxy-Status") != tt.status || resp.Header.Get("Proxy-Authenticate") != tt.auth {
			t.Errorf("got %v %q, %v", resp, body, err)
		}
	}
}
