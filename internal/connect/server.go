package connect

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// Request is what a client asks for.
type Request struct {
	Host string // a name or an IP address without brackets
	Port uint16 // not 0

	// User and Password are what the client shows of itself with Proxy-Authorization: Basic
	// (RFC 7617). HasUser is false where it shows nothing, or nothing that can be read.
	User, Password string
	HasUser        bool
}

// RequestError is a request that is refused for its form. Code is the status to answer with, and
// Text a sentence for the person who reads the answer.
type RequestError struct {
	Code int
	Text string
}

// Error returns the text with the package's prefix.
func (e *RequestError) Error() string { return "connect: bad request: " + e.Text }

func bad(format string, args ...any) error { return &RequestError{400, fmt.Sprintf(format, args...)} }

// ReadRequest reads one CONNECT request from r; got is what the caller has already read from r, and
// precedes it. It returns the bytes that it has read behind the request's head: they are the tunnel's
// first, and share got's array or another.
//
// It is strict in what it takes (RFC 9112): lines end with CRLF or LF and are not folded, the request line has
// exactly three parts, the target is a host and a port, one Host header at most. A request that says
// it has content is refused: CONNECT has none, and where that content would end is anybody's guess.
// A form error is a [*RequestError]; errors of r come as they are, io.EOF inside of a head as
// io.ErrUnexpectedEOF.
func ReadRequest(r io.Reader, got []byte) (req Request, rest []byte, err error) {
	lines, rest, err := readHead(r, got, nil)
	switch {
	case err == errTooLong:
		return Request{}, nil, &RequestError{431, fmt.Sprintf("the request's head is longer than %d bytes", MaxHead)}
	case err == errControl:
		return Request{}, nil, bad("control character in the request's head")
	case err != nil:
		return Request{}, nil, err
	}
	if req, err = parseRequest(lines); err != nil {
		return Request{}, nil, err
	}
	return req, rest, nil
}

func parseRequest(lines []string) (req Request, err error) {
	if len(lines) == 0 || lines[0] == "" {
		return req, bad("empty request line")
	}
	method, rest, _ := strings.Cut(lines[0], " ")
	target, version, ok := strings.Cut(rest, " ")
	if !ok || !isToken(method) || target == "" {
		return req, bad("the first line is not of the form CONNECT host:port HTTP/1.1")
	}
	if !isVersion1(version) {
		if strings.HasPrefix(version, "HTTP/") {
			return req, &RequestError{505, "only HTTP/1.1 and HTTP/1.0 are spoken here"}
		}
		return req, bad("the first line is not of the form CONNECT host:port HTTP/1.1")
	}
	if method != "CONNECT" {
		return req, &RequestError{405, "only CONNECT is understood here"}
	}
	if req.Host, req.Port, err = ParseTarget(target); err != nil {
		return req, err
	}
	seen := make(map[string]bool, 4) // headers that may stand once
	for _, line := range lines[1:] {
		name, value, ok := field(line)
		if !ok {
			if line[0] == ' ' || line[0] == '\t' {
				return req, bad("a header is continued on the next line, which RFC 9112 forbids")
			}
			return req, bad("a header is not of the form name: value")
		}
		name = strings.ToLower(name)
		switch name {
		case "content-length":
			if strings.Trim(value, "0") != "" || value == "" {
				return req, bad("CONNECT has no content, but there is a Content-Length")
			}
		case "transfer-encoding":
			return req, bad("CONNECT has no content, but there is a Transfer-Encoding")
		case "host":
			// The target counts, whatever stands here (RFC 9112 section 3.2.2).
		case "proxy-authorization":
			req.User, req.Password, req.HasUser = parseBasic(value)
		default:
			continue
		}
		if seen[name] {
			return req, bad("more than one %s header", http.CanonicalHeaderKey(name))
		}
		seen[name] = true
	}
	return req, nil
}

// isVersion1 says whether s is HTTP/1.x, case-sensitive as RFC 9112 section 2.3 has it.
func isVersion1(s string) bool {
	return len(s) == len("HTTP/1.1") && strings.HasPrefix(s, "HTTP/1.") && '0' <= s[7] && s[7] <= '9'
}

// ParseTarget reads the target of a CONNECT (authority-form, RFC 9112 section 3.2.3): host, colon, port. There is no
// default port. An IPv6 address stands in brackets, which host is without. An error is a [*RequestError].
func ParseTarget(s string) (host string, port uint16, err error) {
	host, digits, err := net.SplitHostPort(s)
	if err != nil {
		if strings.Contains(s, "://") {
			return "", 0, bad("the target of CONNECT is a host and a port, not a URL")
		}
		return "", 0, bad("the target of CONNECT is not of the form host:port: missing port?")
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n == 0 || strings.Trim(digits, "0123456789") != "" {
		return "", 0, bad("the target's port is not a number from 1 to 65535")
	}
	ok := isHost(host)
	if s[0] == '[' {
		ip, err := netip.ParseAddr(host)
		ok = err == nil && ip.Is6()
	}
	if !ok {
		return "", 0, bad("the target's host is neither a name nor an IP address")
	}
	return host, uint16(n), nil
}

// isHost says whether s can be a name or an IPv4 address: nothing that would end or divide a host
// elsewhere, in a URL, a header or a resolver's query.
func isHost(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`/?#@[]\:<>"%`, c) >= 0 {
			return false
		}
	}
	return s != "" && len(s) <= 255
}

func parseBasic(value string) (user, password string, ok bool) {
	scheme, encoded, _ := strings.Cut(value, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", "", false
	}
	plain, err := base64.StdEncoding.DecodeString(strings.Trim(encoded, " "))
	if err != nil {
		return "", "", false
	}
	return strings.Cut(string(plain), ":")
}

// WriteOK tells the client yes. The tunnel's bytes come next.
func WriteOK(w io.Writer) error {
	_, err := io.WriteString(w, "HTTP/1.1 200 Connection established\r\n\r\n")
	return err
}

// Refusal is the answer no.
type Refusal struct {
	Code  int    // the status, 4xx or 5xx
	Error string // what went wrong, as an error type of RFC 9209 such as connection_refused; empty: nothing is said
	Text  string // a sentence for a person, the answer's content
}

// Via is how the header Proxy-Status names this proxy.
const Via = "sluice"

// Challenge is the Proxy-Authenticate header of an answer 407.
const Challenge = `Basic realm="sluice", charset="UTF-8"`

// ProxyStatus returns the value of the header Proxy-Status, empty where there is nothing to say.
func (r Refusal) ProxyStatus() string {
	if r.Error == "" {
		return ""
	}
	return Via + "; error=" + r.Error
}

// WriteRefusal tells the client no. The answer is the conn's last: the caller closes it, but not
// before the client can have read the answer.
func WriteRefusal(w io.Writer, r Refusal) error {
	var b strings.Builder
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", r.Code, http.StatusText(r.Code))
	if r.Code == http.StatusProxyAuthRequired {
		b.WriteString("Proxy-Authenticate: " + Challenge + "\r\n")
	}
	if s := r.ProxyStatus(); s != "" {
		b.WriteString("Proxy-Status: " + s + "\r\n")
	}
	text := r.Text + "\n"
	fmt.Fprintf(&b, "Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(text), text)
	_, err := io.WriteString(w, b.String())
	return err
}

// RefusalOf returns the answer to a request that [ReadRequest] could not read; ok is false where err
// is not the request's fault but the conn's, and nobody is there to be answered.
func RefusalOf(err error) (r Refusal, ok bool) {
	e, ok := errors.AsType[*RequestError](err)
	if !ok {
		return Refusal{}, false
	}
	return Refusal{Code: e.Code, Error: "http_request_error", Text: "sluice: " + e.Text + "."}, true
}
