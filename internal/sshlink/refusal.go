package sshlink

import (
	"fmt"
	"net"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
)

// Refusal is a server's no to a stream, RFC 4254 section 5.1. It wraps the error that a direct
// connection would have failed with, as far as the server tells.
type Refusal struct {
	Reason  ssh.RejectionReason
	Message string // what the server says, in a form that is fit for a log
	cause   error
}

func newRefusal(e *ssh.OpenChannelError, host string) *Refusal {
	r := &Refusal{Reason: e.Reason, Message: printable(e.Message)}
	switch e.Reason {
	case ssh.Prohibited:
		r.cause = syscall.EACCES
	case ssh.UnknownChannelType:
		r.cause = syscall.EPROTONOSUPPORT
	case ssh.ResourceShortage:
		r.cause = syscall.EAGAIN
	default:
		r.cause = causeOf(r.Message, host)
	}
	return r
}

// Error returns the reason in the words of the RFC, and the server's.
func (r *Refusal) Error() string {
	if r.Message == "" || strings.EqualFold(r.Message, r.Reason.String()) || r.Message == "open failed" {
		return "refused by the server: " + r.Reason.String()
	}
	return fmt.Sprintf("refused by the server: %v (%s)", r.Reason, r.Message)
}

// Unwrap returns the error of a direct connection: EACCES, ECONNREFUSED, a [net.DNSError] and so on.
func (r *Refusal) Unwrap() error { return r.cause }

// The protocol has one code for all that can go wrong with a connection, and servers add what strerror
// and gai_strerror say, in the words of their C library.
var causes = []struct {
	words string
	err   error
}{
	{"connection refused", syscall.ECONNREFUSED},
	{"timed out", syscall.ETIMEDOUT},
	{"no route to host", syscall.EHOSTUNREACH},
	{"host is unreachable", syscall.EHOSTUNREACH},
	{"host is down", syscall.EHOSTDOWN},
	{"network is unreachable", syscall.ENETUNREACH},
	{"network unreachable", syscall.ENETUNREACH},
	{"permission denied", syscall.EACCES},
	{"connection reset", syscall.ECONNRESET},
	{"no such file", syscall.ENOENT},
}

// noHosts are the words of resolvers for a name that does not exist.
var noHosts = []string{
	"name or service not known", "nodename nor servname", "name does not resolve", "no address associated",
	"unknown host", "no such host", "non-recoverable failure in name resolution",
}

// causeOf returns the error that message, a server's, stands for.
func causeOf(message, host string) error {
	m := strings.ToLower(message)
	for _, words := range noHosts {
		if strings.Contains(m, words) {
			return &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
	}
	if strings.Contains(m, "failure in name resolution") {
		return &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
	}
	for _, c := range causes {
		if strings.Contains(m, c.words) {
			return c.err
		}
	}
	return syscall.ECONNREFUSED
}

// printable returns s, which a server has sent, without what could confuse a terminal or a log.
func printable(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, s)
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}
