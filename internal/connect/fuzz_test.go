package connect

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

// FuzzReadRequest checks that what is accepted can be asked for again, that no byte is lost behind the
// head, and that how the bytes are cut does not matter.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\nearly"), 3)
	f.Add([]byte("CONNECT [::1]:1 HTTP/1.0\nProxy-Authorization: Basic YTpi\n\n"), 0)
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\nA: b\r\n c\r\nTransfer-Encoding: chunked\r\n\r\n"), 9)
	f.Add(bytes.Repeat([]byte("C"), MaxHead+2), MaxHead)
	f.Fuzz(func(t *testing.T, in []byte, cut int) {
		cut = max(0, min(cut, len(in)))
		r := bytes.NewReader(in[cut:])
		req, rest, err := ReadRequest(r, bytes.Clone(in[:cut]))
		left, _ := io.ReadAll(r)
		slow := bytes.NewReader(in)
		again, _, slowErr := ReadRequest(iotest.OneByteReader(slow), nil)
		if (err == nil) != (slowErr == nil) || again != req {
			t.Fatalf("cut at %d: %+v, %v; byte by byte: %+v, %v", cut, req, err, again, slowErr)
		}
		if err != nil {
			if e, ok := errors.AsType[*RequestError](err); ok && (e.Code < 400 || e.Code > 505 || e.Text == "") {
				t.Fatalf("%+v", e)
			}
			return
		}
		behind := append(bytes.Clone(rest), left...)
		head := in[:len(in)-len(behind)]
		if !bytes.HasSuffix(in, behind) || !bytes.HasSuffix(head, []byte("\n")) || slow.Len() != len(behind) {
			t.Fatalf("head %q, behind it %q, want %d bytes", head, behind, slow.Len())
		}
		var b bytes.Buffer
		if err := WriteRequest(&b, req.Host, req.Port, "", ""); err != nil {
			t.Fatalf("%+v cannot be asked for: %v", req, err)
		}
		same, _, err := ReadRequest(&b, nil)
		if err != nil || same.Host != req.Host || same.Port != req.Port {
			t.Fatalf("%+v became %+v, %v", req, same, err)
		}
	})
}

// FuzzReadResponse checks the same of answers.
func FuzzReadResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 Connection established\r\n\r\nearly"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 204\n\n"))
	f.Add([]byte("HTTP/1.1 502 x\r\nProxy-Status: a;b=\"c\\\"\", d; error=dns_error; details=\"e\"\r\n\r\n"))
	f.Add([]byte("SSH-2.0-x\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		rest, err := ReadResponse(r)
		left, _ := io.ReadAll(r)
		slow := bytes.NewReader(in)
		_, slowErr := ReadResponse(iotest.OneByteReader(slow))
		if (err == nil) != (slowErr == nil) {
			t.Fatalf("at once: %v; byte by byte: %v", err, slowErr)
		}
		if err != nil {
			_ = err.Error()
			if e, ok := errors.AsType[*StatusError](err); ok && (e.Code < 300 || e.Code > 999) {
				t.Fatalf("%+v", e)
			}
			return
		}
		if behind := append(bytes.Clone(rest), left...); !bytes.HasSuffix(in, behind) || slow.Len() != len(behind) {
			t.Fatalf("behind the head %q, want %d bytes", behind, slow.Len())
		}
	})
}
