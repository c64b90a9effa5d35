package enclosure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// The outside and the inside talk over a pair of Unix sockets that keep messages apart. The outside says what is
// wanted (a Network); the inside answers with the device, or with what went wrong; the outside says go (an empty
// struct); and the inside's socket closes as it becomes the command, or it says why it could not.

// messageMax is more than any message takes.
const messageMax = 16 << 10

// answer is what the inside says.
type answer struct {
	MTU    int // of the device that comes along
	NoIPv6 bool

	Problem string // what went wrong, or empty
	Errno   syscall.Errno
	Command bool // it is the command that could not be executed
}

// problem is an error of the inside, outside.
type problem struct {
	text  string
	errno syscall.Errno
}

func (p *problem) Error() string { return p.text }
func (p *problem) Unwrap() error {
	if p.errno == 0 {
		return nil
	}
	return p.errno
}

func (a *answer) err() error {
	if a.Problem == "" {
		return nil
	}
	return &problem{a.Problem, a.Errno}
}

func answerOf(err error) answer {
	a := answer{Problem: err.Error()}
	errors.As(err, &a.Errno)
	return a
}

// socketpair returns two sockets, the second of which the child is to inherit under the same number. It is not
// passed as one of exec's files, whose numbers may be those of files that the command is to inherit.
func socketpair() (outside, inside *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETFD, 0); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "enclosure"), os.NewFile(uintptr(fds[1]), "enclosure"), nil
}

// send sends v with fd, where that is not negative.
func send(f *os.File, v any, fd int) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	for {
		err = unix.Sendmsg(int(f.Fd()), data, rights, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}

// receive waits for a message, stores it in v, and returns the file that came along, or nil. The error is [io.EOF] when
// the other side has closed.
func receive(f *os.File, v any) (*os.File, error) {
	data, rights := make([]byte, messageMax), make([]byte, unix.CmsgSpace(4))
	var n, rn, flags int
	for {
		var err error
		n, rn, flags, _, err = unix.Recvmsg(int(f.Fd()), data, rights, unix.MSG_CMSG_CLOEXEC)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return nil, err
		}
	}
	var file *os.File
	if messages, err := unix.ParseSocketControlMessage(rights[:rn]); err == nil && len(messages) == 1 {
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			file = os.NewFile(uintptr(fds[0]), "/dev/net/tun")
		}
	}
	if n == 0 {
		return file, io.EOF
	}
	if flags&unix.MSG_TRUNC != 0 {
		return file, fmt.Errorf("a message of more than %d bytes", messageMax)
	}
	return file, json.Unmarshal(data[:n], v)
}
