// Package connect is the HTTP CONNECT method (RFC 9110 section 9.3.6): how a client asks an HTTP
// proxy for a bare stream to a host, and how the proxy answers.
//
// The client sends a request head and nothing else,
//
//	CONNECT example.com:443 HTTP/1.1
//	Host: example.com:443
//	Proxy-Authorization: Basic dXNlcjpwYXNzd29yZA==
//
// and the proxy, once it is connected, answers with a head of status 200. What follows either head
// is no HTTP: the conn is a tunnel from its next byte on. Neither end knows how long the other's head
// is before it has read it, so both halves read in blocks and return what they read too many.
//
// [ReadRequest], [WriteOK] and [WriteRefusal] are the proxy's half, [WriteRequest] and
// [ReadResponse] the client's. All are plain functions of a reader or a writer, without deadlines: the
// caller sets those on its conn, or closes it.
//
// A proxy that cannot connect says why by its status code and, more exactly, by the header
// Proxy-Status (RFC 9209). On the client's side both become a [StatusError], which equals the errno
// that a direct connection would have failed with.
package connect

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// MaxHead is how many bytes a head may have, of a request and of a response.
const MaxHead = 16 << 10

// firstRead is what a head is first read into. It grows up to MaxHead for those that are longer.
const firstRead = 2 << 10

// errTooLong is returned by readHead.
var errTooLong = fmt.Errorf("connect: head longer than %d bytes", MaxHead)

// readHead reads up to the empty line that ends a head. buf is what has been read already. It returns
// the head's lines without their ends, the start line first, and the bytes behind the head.
//
// check, if not nil, looks at what has come so far and may end the reading. A reader that ends before
// the head does is io.ErrUnexpectedEOF, or io.EOF where there was not a byte.
func readHead(r io.Reader, buf []byte, check func(got []byte) error) (lines []string, rest []byte, err error) {
	for scanned, empty := 0, 0; ; {
		if check != nil {
			if err := check(buf); err != nil {
				return nil, nil, err
			}
		}
		if n := endOfHead(buf, scanned); n > MaxHead || n < 0 && len(buf) > MaxHead {
			return nil, nil, errTooLong
		} else if n >= 0 {
			lines, err := splitLines(buf[:n])
			return lines, buf[n:], err
		}
		scanned = len(buf)
		if len(buf) == cap(buf) {
			grown := make([]byte, len(buf), min(max(firstRead, 2*cap(buf)), max(MaxHead, len(buf))+1))
			copy(grown, buf)
			buf = grown
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case n > 0: // an error comes back with the next read, if it is still of interest
			empty = 0
		case err == io.EOF && len(buf) > 0:
			return nil, nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, nil, err
		default:
			if empty++; empty == 100 {
				return nil, nil, io.ErrNoProgress
			}
		}
	}
}

// endOfHead returns the index behind the first empty line, or -1. Lines end with LF or CRLF
// (RFC 9112 section 2.2). The bytes before scanned were looked at before.
func endOfHead(b []byte, scanned int) int {
	for i := max(scanned-2, 0); ; { // an LF may be two bytes before the one that ends the head
		lf := bytes.IndexByte(b[i:], '\n')
		if lf < 0 {
			return -1
		}
		i += lf + 1
		switch rest := b[i:]; {
		case len(rest) >= 1 && rest[0] == '\n':
			return i + 1
		case len(rest) >= 2 && rest[0] == '\r' && rest[1] == '\n':
			return i + 2
		}
	}
}

// errControl is returned by splitLines.
var errControl = errors.New("connect: control character in the head")

// splitLines returns the lines of a head that ends with an empty line, without that one. No line
// has a control character but tabs: a CR within a line is one that other software may take for an end.
func splitLines(head []byte) ([]string, error) {
	lines := strings.Split(string(head), "\n")
	lines = lines[:len(lines)-2] // the empty line, and what Split finds behind the last LF
	for i, line := range lines {
		line = strings.TrimSuffix(line, "\r")
		for j := range len(line) {
			if c := line[j]; c < ' ' && c != '\t' || c == 0x7f {
				return nil, errControl
			}
		}
		lines[i] = line
	}
	return lines, nil
}

// field splits a header line; ok is false where it is none, or continues the line before
// (obs-fold). The value is without the white space around it.
func field(line string) (name, value string, ok bool) {
	name, value, ok = strings.Cut(line, ":")
	return name, strings.Trim(value, " \t"), ok && isToken(name)
}

// isToken says whether s is a token as in RFC 9110 section 5.6.2.
func isToken(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return s != ""
}
