package connect

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
)

// maxInterim is how many 1xx answers may come before the real one.
const maxInterim = 8

// WriteRequest asks the proxy behind w for a stream to host and port. A name is sent as a name: the
// proxy resolves it. user and password are sent where user is not empty, readable by everybody who
// sees the bytes. What is not a host, or a user name with a colon (which RFC 7617 cannot carry), is an error
// before anything is written.
func WriteRequest(w io.Writer, host string, port uint16, user, password string) error {
	target := net.JoinHostPort(host, strconv.Itoa(int(port)))
	if _, _, err := ParseTarget(target); err != nil {
		return fmt.Errorf("connect: %q cannot be asked for: not a host and port", target)
	}
	if strings.Contains(user, ":") {
		return errors.New("connect: user name with a colon")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", target, target)
	if user != "" {
		b.WriteString("Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + "\r\n")
	}
	b.WriteString("\r\n")
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("connect: sending the request: %w", err)
	}
	return nil
}

// ReadResponse reads the proxy's answer from r. Any 2xx is a yes, and then rest are the bytes read
// behind the answer's head: the tunnel's first, whatever the headers say of content. Answers 1xx
// are skipped. A no is a [*StatusError]; its content is not read. A proxy that closes instead of answering
// is io.ErrUnexpectedEOF.
func ReadResponse(r io.Reader) (rest []byte, err error) {
	for range maxInterim + 1 {
		var lines []string
		lines, rest, err = readHead(r, rest, looksLikeHTTP)
		_, foreign := err.(notHTTP)
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return nil, fmt.Errorf("connect: the proxy closed instead of answering: %w", io.ErrUnexpectedEOF)
		case foreign || err == errTooLong || err == errControl:
			return nil, err
		case err != nil:
			return nil, fmt.Errorf("connect: reading the answer: %w", err)
		}
		answer, err := parseResponse(lines)
		switch {
		case err != nil:
			return nil, err
		case answer.Code == 101:
			return nil, errors.New("connect: the proxy switches to a protocol that it was not asked for")
		case answer.Code < 200:
			continue
		case answer.Code < 300:
			return rest, nil
		}
		return nil, answer
	}
	return nil, errors.New("connect: too many interim answers")
}

// looksLikeHTTP ends the wait for an answer that cannot become one, as when the port is that of
// another service, which may be waiting too.
func looksLikeHTTP(got []byte) error {
	const begin = "HTTP/1."
	if n := min(len(got), len(begin)); string(got[:n]) != begin[:n] {
		return notHTTP(got[:min(len(got), 32)])
	}
	return nil
}

// notHTTP is the beginning of an answer that is none.
type notHTTP string

func (e notHTTP) Error() string {
	return fmt.Sprintf("connect: the answer is not HTTP/1: it begins with %q", string(e))
}

// parseResponse takes what a response says of interest, and is lenient with the rest.
func parseResponse(lines []string) (*StatusError, error) {
	if len(lines) == 0 {
		return nil, errors.New("connect: the answer has no status line")
	}
	version, status, _ := strings.Cut(lines[0], " ")
	digits, _, _ := strings.Cut(status, " ")
	code, err := strconv.Atoi(digits)
	if !isVersion1(version) || err != nil || len(digits) != 3 || code < 100 {
		return nil, fmt.Errorf("connect: %q is not a status line", lines[0])
	}
	e := &StatusError{Code: code, Status: status}
	for _, line := range lines[1:] {
		name, value, ok := field(line)
		if ok && strings.EqualFold(name, "Proxy-Status") && e.ProxyStatus == "" {
			e.ProxyStatus, e.Details = parseProxyStatus(value)
		}
	}
	return e, nil
}

// parseProxyStatus returns the error type and details of the first proxy in the list that has an
// error: the one closest to the origin, which knows best (RFC 9209 section 2).
func parseProxyStatus(value string) (typ, details string) {
	for _, member := range splitUnquoted(value, ',') {
		typ, details = "", ""
		for _, param := range splitUnquoted(member, ';') {
			key, v, _ := strings.Cut(strings.Trim(param, " \t"), "=")
			switch key {
			case "error":
				if isToken(v) {
					typ = v
				}
			case "details":
				details = unquote(v)
			}
		}
		if typ != "" {
			return typ, details
		}
	}
	return "", ""
}

// splitUnquoted splits s at sep where that is not within a string (RFC 8941 section 3.3.3).
func splitUnquoted(s string, sep byte) (parts []string) {
	quoted := false
	start := 0
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case s[i] == '\\' && quoted:
			i++
		case s[i] == sep && !quoted:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// unquote returns the text of a string as RFC 8941 writes it, empty where s is none.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return ""
	}
	var b strings.Builder
	for i := 1; i < len(s)-1; i++ {
		if s[i] == '\\' && i+1 < len(s)-1 {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// StatusError is a proxy's no.
type StatusError struct {
	Code        int    // 3xx, 4xx or 5xx
	Status      string // the code with its phrase, "502 Bad Gateway"
	ProxyStatus string // the error type of the header Proxy-Status, such as connection_refused; may be empty
	Details     string // what Proxy-Status says beside; may be empty
}

// Error says what the proxy said.
func (e *StatusError) Error() string {
	s := "connect: the proxy answered " + printable(e.Status)
	switch {
	case e.Details != "":
		s += " (" + e.ProxyStatus + ": " + printable(e.Details) + ")"
	case e.ProxyStatus != "":
		s += " (" + e.ProxyStatus + ")"
	case e.Code == 407:
		s += ": it wants a user and password that it knows"
	}
	return s
}

// printable keeps bytes of an answer from doing anything in a terminal or log.
func printable(s string) string {
	q := strconv.QuoteToASCII(s[:min(len(s), 200)])
	return q[1 : len(q)-1]
}

// Is says which errno e equals, so that a reason passes through a chain of proxies. The error type
// counts first, as it is exact. Of the codes, 401, 403 and 407 are EACCES, 504 is ETIMEDOUT, 405 and
// 501 are [errors.ErrUnsupported]. 502 and 503 say only that the proxy could not connect: EHOSTUNREACH,
// and not ECONNREFUSED, which would say that there is a host and that nobody listens. Other codes
// equal nothing.
func (e *StatusError) Is(target error) bool {
	equal, ok := errorTypes[e.ProxyStatus]
	if !ok {
		equal = codes[e.Code]
	}
	return equal != nil && target == equal
}

// errorTypes are those of RFC 9209 section 2.3 that have an errno. A name that cannot be resolved is
// ENOENT, which is the errno for what does not exist.
var errorTypes = map[string]error{
	"dns_timeout":               syscall.ETIMEDOUT,
	"dns_error":                 syscall.ENOENT,
	"destination_not_found":     syscall.ENOENT,
	"destination_unavailable":   syscall.EHOSTUNREACH,
	"destination_ip_prohibited": syscall.EACCES,
	"destination_ip_unroutable": syscall.EHOSTUNREACH,
	"connection_refused":        syscall.ECONNREFUSED,
	"connection_terminated":     syscall.ECONNRESET,
	"connection_timeout":        syscall.ETIMEDOUT,
	"connection_read_timeout":   syscall.ETIMEDOUT,
	"connection_write_timeout":  syscall.ETIMEDOUT,
	"connection_limit_reached":  syscall.EHOSTUNREACH,
	"http_request_denied":       syscall.EACCES,
	"http_response_incomplete":  syscall.ECONNRESET,
	"http_response_timeout":     syscall.ETIMEDOUT,
}

var codes = map[int]error{
	401: syscall.EACCES,
	403: syscall.EACCES,
	405: errors.ErrUnsupported,
	407: syscall.EACCES,
	501: errors.ErrUnsupported,
	502: syscall.EHOSTUNREACH,
	503: syscall.EHOSTUNREACH,
	504: syscall.ETIMEDOUT,
}
