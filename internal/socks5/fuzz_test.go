package socks5

import (
	"bytes"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
)

// FuzzServer: no input panics; a request that is taken is taken alike however it arrives, was read to
// its last byte and not behind it, and comes out again as it went in when a Client sends it.
func FuzzServer(f *testing.F) {
	f.Add([]byte(request(1, v4Addr)+rest), false)
	f.Add([]byte(request(3, nameAddr)), false)
	f.Add([]byte(request(1, "\x03\x0d[2001:db8::9]\x00\x50")), false)
	f.Add([]byte("\x05\x02\x00\x02\x01\x03bob\x07hunter2\x05\x01\x00"+v4Addr), true)
	f.Add([]byte("\x05\x01\x02\x01\x00\x00\x05\x01\x00"+v4Addr), false)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), false)
	f.Add([]byte("\x04\x01\x00\x50\x7f\x00\x00\x01\x00"), true)
	f.Fuzz(func(t *testing.T, in []byte, auth bool) {
		s := &Server{}
		if auth {
			s.Check = bob
		}
		run := func(wrap func(io.Reader) io.Reader, in []byte) (Request, int, error) {
			r := bytes.NewReader(in)
			req, err := s.Handshake(&script{Reader: wrap(r)})
			return req, len(in) - r.Len(), err
		}
		whole := func(r io.Reader) io.Reader { return r }
		req, n, err := run(whole, in)
		slow, slowN, slowErr := run(iotest.OneByteReader, in)
		if req != slow || (err == nil) != (slowErr == nil) || err != nil && err.Error() != slowErr.Error() {
			t.Fatalf("at once %+v, %v; byte by byte %+v, %v", req, err, slow, slowErr)
		}
		if err != nil {
			return
		}
		if n != slowN {
			t.Fatalf("read %d bytes at once, %d byte by byte", n, slowN)
		}
		if _, _, err := run(whole, in[:n-1]); err == nil {
			t.Fatalf("read %d bytes of a shorter handshake", n)
		}
		if strings.ContainsAny(req.Addr.Host, "\x00 \r\n/@[]") || req.Addr.Host == "" {
			t.Fatalf("took host %q", req.Addr.Host)
		}
		if strings.Contains(req.Addr.Host, "%") && strings.Contains(req.Addr.Host, ":") {
			return // an address with a zone, which a client does not send
		}
		peer := &script{Reader: strings.NewReader("\x05\x00\x05\x00\x00" + v4Addr)}
		if _, err := new(Client).Handshake(peer, req.Command, req.Addr); err != nil {
			t.Fatalf("client cannot ask for %+v: %v", req, err)
		}
		again, err := new(Server).Handshake(&script{Reader: &peer.told})
		if again.User = req.User; err != nil || again != req {
			t.Fatalf("%+v came back as %+v, %v", req, again, err)
		}
	})
}

// FuzzClient: no input panics; a reply that is taken is taken alike however it arrives, and was read
// to its last byte and not behind it.
func FuzzClient(f *testing.F) {
	f.Add([]byte("\x05\x00\x05\x00\x00"+v4Addr+rest), false)
	f.Add([]byte("\x05\x02\x01\x00\x05\x00\x00"+nameAddr), true)
	f.Add([]byte("\x05\x00\x05\x00\x00\x03\x00\x00\x00"), true)
	f.Add([]byte("\x05\x00\x05\x05"), false)
	f.Add([]byte("\x05\xff"), false)
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, in []byte, auth bool) {
		c := new(Client)
		if auth {
			c = bobs
		}
		run := func(wrap func(io.Reader) io.Reader, in []byte) (Addr, int, error) {
			r := bytes.NewReader(in)
			bound, err := c.Handshake(&script{Reader: wrap(r)}, Connect, Addr{"example.com", 443})
			return bound, len(in) - r.Len(), err
		}
		whole := func(r io.Reader) io.Reader { return r }
		bound, n, err := run(whole, in)
		slow, slowN, slowErr := run(iotest.OneByteReader, in)
		if bound != slow || (err == nil) != (slowErr == nil) || err != nil && err.Error() != slowErr.Error() {
			t.Fatalf("at once %+v, %v; byte by byte %+v, %v", bound, err, slow, slowErr)
		}
		if err != nil {
			return
		}
		if n != slowN {
			t.Fatalf("read %d bytes at once, %d byte by byte", n, slowN)
		}
		if _, _, err := run(whole, in[:n-1]); err == nil {
			t.Fatalf("read %d bytes of a shorter handshake", n)
		}
	})
}

// FuzzRoundTrip: what a Client asks for is what a Server hears, and what the server replies is what
// the client hears.
func FuzzRoundTrip(f *testing.F) {
	f.Add("example.com", uint16(443), byte(1), "bob", "hunter2", byte(0))
	f.Add("::ffff:1.2.3.4", uint16(0), byte(3), "", "", byte(5))
	f.Add("[2001:db8::1]", uint16(80), byte(2), "u", "", byte(200))
	f.Fuzz(func(t *testing.T, host string, port uint16, cmd byte, user, password string, reply byte) {
		heard := ""
		s := &Server{Check: func(u, p string) bool { heard = u + "\x00" + p; return true }}
		answers := "\x05\x02\x01\x00"
		if user == "" {
			s.Check, answers = nil, "\x05\x00"
		}
		var b bytes.Buffer
		bound := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, cmd}), port)
		WriteReply(&b, Reply(reply), bound)
		peer := &script{Reader: strings.NewReader(answers + b.String())}
		got, err := (&Client{User: user, Password: password}).Handshake(peer, Command(cmd), Addr{host, port})
		if peer.told.Len() == 0 {
			return // cannot be asked for
		}
		if reply == 0 && (err != nil || got.String() != bound.String()) || reply != 0 && err != Reply(reply) {
			t.Fatalf("replied %d %v, heard %v, %v", reply, bound, got, err)
		}
		req, err := s.Handshake(&script{Reader: &peer.told})
		if err != nil {
			t.Fatalf("server: %v", err)
		}
		want, _ := normalHost(host)
		if req != (Request{Command(cmd), Addr{want, port}, user}) || peer.told.Len() > 0 {
			t.Fatalf("asked for %q %d as %q, server heard %+v", host, port, user, req)
		}
		if user != "" && heard != user+"\x00"+password {
			t.Fatalf("server was shown %q", heard)
		}
	})
}
