package inbound

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
)

// bindError is an error of bind in words that say what to do; it is the error beneath to errors.Is.
type bindError struct {
	text string
	err  error
}

func (e *bindError) Error() string { return "inbound: " + e.text }
func (e *bindError) Unwrap() error { return e.err }

// bind listens at a. control, which may be nil, sets options of a TCP socket.
func bind(ctx context.Context, a proxy.Addr, mode fs.FileMode, control sockopt.Control) (net.Listener, error) {
	switch a.Network {
	case "tcp":
		return bindTCP(ctx, a, control)
	case "udp":
		return nil, fmt.Errorf("inbound: cannot listen at %v: streams are served here, not datagrams: %w", a, errors.ErrUnsupported)
	case "unix":
		return bindUnix(ctx, a.Host, cmp.Or(mode.Perm(), 0o600))
	case "":
		return nil, errors.New("inbound: no address to listen at")
	}
	return nil, fmt.Errorf("inbound: cannot listen at %v: %w", a, errors.ErrUnsupported)
}

func bindTCP(ctx context.Context, a proxy.Addr, control sockopt.Control) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: sockopt.KeepAlive(), Control: control}
	// Sockets of multipath TCP differ in resets and options, and the relay counts on those of TCP.
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", a.HostPort())
	if err != nil {
		return nil, explainBind(a, err)
	}
	return ln, nil
}

// bindUDP opens a socket for datagrams at a, with these options beside those that all have.
func bindUDP(ctx context.Context, a proxy.Addr, options ...sockopt.Control) (*net.UDPConn, error) {
	const receiveBuffer = 4 << 20 // for the loop to be away for a while
	lc := net.ListenConfig{Control: sockopt.All(append(options, sockopt.ReceiveBuffer(receiveBuffer))...)}
	c, err := lc.ListenPacket(ctx, "udp", a.HostPort())
	if err != nil {
		return nil, explainBind(a, err)
	}
	return c.(*net.UDPConn), nil
}

// explainBind adds to err, of binding a, what can be done about it.
func explainBind(a proxy.Addr, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &bindError{inUse(a.String(), boundInode(a)), err}
	case errors.Is(err, syscall.EACCES) && a.Port > 0 && a.Port < 1024:
		return &bindError{fmt.Sprintf("%v: ports below 1024 need privileges: choose a higher port, or allow it with "+
			"`setcap cap_net_bind_service=+ep` on the program", a), err}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return &bindError{fmt.Sprintf("%v: this machine has no address %s", a, a.Host), err}
	}
	return fmt.Errorf("inbound: %w", err)
}

// bindUnix listens at a socket file, which Close removes. A socket file that nobody listens at is
// left from a process that died, and replaced.
func bindUnix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	abstract := strings.HasPrefix(path, "@") // Linux: a name without a file
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		if abstract {
			return nil
		}
		// Linux gives the file these permissions, so that there is no moment with others.
		return c.Control(func(fd uintptr) { fchmod(fd, mode) })
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if errors.Is(err, syscall.EADDRINUSE) && !abstract {
		if err := removeStale(ctx, path); err != nil {
			return nil, err
		}
		ln, err = lc.Listen(ctx, "unix", path)
	}
	switch {
	case err == nil:
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, &bindError{inUse("unix://"+path, unixInode(path)), err}
	case errors.Is(err, syscall.ENOENT):
		return nil, &bindError{fmt.Sprintf("unix://%s: there is no such directory", path), err}
	case errors.Is(err, syscall.EACCES):
		return nil, &bindError{fmt.Sprintf("unix://%s: no permission to make a file there", path), err}
	default:
		return nil, fmt.Errorf("inbound: %w", err)
	}
	if abstract {
		return ln, nil
	}
	if err := os.Chmod(path, mode); err != nil { // other systems than Linux; Linux: what the umask took
		ln.Close()
		return nil, fmt.Errorf("inbound: %w", err)
	}
	return ln, nil
}

// removeStale removes the socket file at path if nobody listens at it.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone by now
	}
	if err != nil {
		return fmt.Errorf("inbound: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return &bindError{fmt.Sprintf("unix://%s: there is a file that is not a socket; it is left alone", path),
			syscall.EADDRINUSE}
	}
	d := net.Dialer{Timeout: time.Second}
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		c.Close()
	}
	// A full queue is EAGAIN: somebody listens. Only ECONNREFUSED says that nobody does.
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return &bindError{inUse("unix://"+path, unixInode(path)), syscall.EADDRINUSE}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("inbound: remove the socket of a process that is gone: %w", err)
	}
	return nil
}

// inUse says who has the listening socket of that inode, where the system lets us know.
func inUse(addr, inode string) string {
	name, pid := socketOwner(inode, time.Now().Add(300*time.Millisecond))
	switch {
	case pid == os.Getpid():
		return fmt.Sprintf("%s is in use by this process already: two inbounds with one address?", addr)
	case pid != 0:
		return fmt.Sprintf("%s is in use by %s (pid %d)", addr, name, pid)
	}
	return fmt.Sprintf("%s is in use by another process", addr)
}
