package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/sluice-proxy/sluice/relay"
)

// Reason is why a session ended or could not begin: one closed set, used for the reply to the
// client, the log, and the metrics alike.
type Reason uint8

// The reasons.
const (
	Done            Reason = iota // both ends ended cleanly
	Canceled                      // the client left, or sluice stops
	Idle                          // no byte moved for the idle limit
	HalfOpen                      // one side had ended and the other was silent for the half-open limit
	Timeout                       // no answer in time
	Denied                        // refused by a rule or for lack of authorization
	NoHost                        // the name does not exist
	Refused                       // nobody listens there
	NetUnreachable                // no route to the network
	HostUnreachable               // no way to the host
	Reset                         // the other end, or a machine in between, broke the connection
	Unsupported                   // asked for something that cannot be done
	Other                         // none of these
)

var reasonNames = [...]string{
	Done: "done", Canceled: "canceled", Idle: "idle", HalfOpen: "half-open", Timeout: "timeout",
	Denied: "denied", NoHost: "no-host", Refused: "refused", NetUnreachable: "net-unreachable",
	HostUnreachable: "host-unreachable", Reset: "reset", Unsupported: "unsupported", Other: "other",
}

// String returns the reason's name as it stands in logs and metrics.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return "other"
}

// ErrDenied is wrapped by errors of rules that refuse a destination or a client.
// It equals [syscall.EACCES], as the refusals of upstream proxies do.
var ErrDenied error = denied{}

type denied struct{}

func (denied) Error() string        { return "denied by rule" }
func (denied) Is(target error) bool { return target == syscall.EACCES }

// ReasonOf says which reason err stands for. It knows errors by [errors.Is] and [errors.As] only:
// the small error types of the protocols say which errno they equal, so that a reason survives
// a chain of proxies. A nil error is Done.
func ReasonOf(err error) Reason {
	if err == nil {
		return Done
	}
	for _, k := range reasonErrors {
		if errors.Is(err, k.err) {
			return k.reason
		}
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		switch {
		case dns.IsNotFound:
			return NoHost
		case dns.IsTimeout:
			return Timeout
		}
		return HostUnreachable
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
		return Timeout
	}
	return Other
}

// reasonErrors is in the order of their precedence: a cause that names the limit or the rule
// comes before the errno that it showed itself by.
var reasonErrors = []struct {
	err    error
	reason Reason
}{
	{relay.ErrIdle, Idle},
	{relay.ErrHalfOpen, HalfOpen},
	{relay.ErrQuota, Denied},
	{context.Canceled, Canceled},
	{ErrStopped, Canceled},
	{context.DeadlineExceeded, Timeout},
	{os.ErrDeadlineExceeded, Timeout},
	{syscall.ETIMEDOUT, Timeout},
	{syscall.EACCES, Denied},
	{syscall.EPERM, Denied},
	{syscall.ECONNREFUSED, Refused},
	{syscall.ENETUNREACH, NetUnreachable},
	{syscall.ENETDOWN, NetUnreachable},
	{syscall.EHOSTUNREACH, HostUnreachable},
	{syscall.EHOSTDOWN, HostUnreachable},
	{syscall.ENOENT, NoHost}, // a Unix socket that is not there
	{syscall.ECONNRESET, Reset},
	{syscall.EPIPE, Reset},
	{syscall.ECONNABORTED, Reset},
	{io.ErrUnexpectedEOF, Reset},
	{io.EOF, Reset}, // an upstream that closed instead of answering
	{errors.ErrUnsupported, Unsupported},
	{syscall.EAFNOSUPPORT, Unsupported},
	{syscall.EPROTONOSUPPORT, Unsupported},
	{net.ErrClosed, Canceled},
}
