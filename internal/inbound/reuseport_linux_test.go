package inbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestSharedPort: two that ask for it share a port, and each gets clients. Who does not ask gets an error that names
// who has it, and who asks alone is told that it takes two.
func TestSharedPort(t *testing.T) {
	var got [2]atomic.Int32
	count := func(n *atomic.Int32) func(context.Context, *client) {
		return func(ctx context.Context, c *client) {
			n.Add(1)
			echo(ctx, c)
		}
	}
	first := start(t, t.Context(), &Listener{Addr: loopback, ReusePort: true}, count(&got[0]))
	shared := proxy.TCP("127.0.0.1", addrPort(first).Port())
	start(t, t.Context(), &Listener{Addr: shared, ReusePort: true}, count(&got[1]))
	for range 200 { // the chance that one gets none is 1 in 2^199
		c := dial(t, first)
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	proxytest.Until(t, "all are taken in", func() bool { return got[0].Load()+got[1].Load() == 200 })
	if got[0].Load() == 0 || got[1].Load() == 0 {
		t.Errorf("one got %d clients, the other %d", got[0].Load(), got[1].Load())
	}

	err := (&Listener{Addr: shared}).Listen(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), shared.String()+" is in use by ") {
		t.Errorf("without the option: %v", err)
	}
	alone := start(t, t.Context(), &Listener{Addr: loopback}, echo)
	err = (&Listener{Addr: proxy.TCP("127.0.0.1", addrPort(alone).Port()), ReusePort: true}).Listen(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "both must ask for that (reuse-port)") {
		t.Errorf("the other does not ask for it: %v", err)
	}
	err = (&Listener{Addr: unixAddr(filepath.Join(t.TempDir(), "s")), ReusePort: true}).Listen(t.Context())
	if err == nil || !strings.Contains(err.Error(), "only a TCP port can be shared") {
		t.Errorf("a Unix socket: %v", err)
	}
}

// TestOtherUserCannotShare runs itself as another user. That is the kernel's rule: nobody can take another's clients.
func TestOtherUserCannotShare(t *testing.T) {
	if to := os.Getenv("SLUICE_TEST_SHARE"); to != "" {
		a, err := proxy.ParseListen(to)
		if err == nil {
			err = (&Listener{Addr: a, ReusePort: true}).Listen(context.Background())
		}
		fmt.Println(err)
		os.Exit(0)
	}
	proxytest.NeedRoot(t)
	a := start(t, t.Context(), &Listener{Addr: loopback, ReusePort: true}, echo)
	out, err := again("^TestOtherUserCannotShare$", "SLUICE_TEST_SHARE="+a.String(),
		&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	if err != nil || !strings.Contains(out, "is in use by another process; to share it, both") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestClosingOfASharedPort shows what docs/forward.md says of restarts: the clients that a closing listener has not accepted are
// reset, unless net.ipv4.tcp_migrate_req gives them to the others. It runs itself in a network namespace of its own.
func TestClosingOfASharedPort(t *testing.T) {
	if migrate := os.Getenv("SLUICE_TEST_MIGRATE"); migrate != "" {
		if err := closeShared(migrate); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	proxytest.NeedRoot(t)
	for _, migrate := range []string{"0", "1"} {
		out, err := again("^TestClosingOfASharedPort$", "SLUICE_TEST_MIGRATE="+migrate,
			&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
		lost := -1
		fmt.Sscanf(out, "lost %d", &lost)
		if err != nil || lost < 0 || (lost == 0) != (migrate == "1") {
			t.Errorf("tcp_migrate_req %s: %v: %s", migrate, err, out)
		}
	}
}

// again runs the test in a process of its own and returns what that prints.
func again(test, env string, attr *syscall.SysProcAttr) (string, error) {
	cmd := exec.Command("/proc/self/exe", "-test.run="+test) // wherever another user may not look
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// closeShared has 100 clients wait at two listeners, closes one, and prints how many of them are lost.
func closeShared(migrate string) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	// Whose file this is depends on the namespace of who opens it, not on the mount.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte(migrate), 0); err != nil {
		return err
	}
	stays := &Listener{Addr: loopback, ReusePort: true}
	if err := stays.Listen(context.Background()); err != nil {
		return err
	}
	goes := &Listener{Addr: proxy.TCP("127.0.0.1", addrPort(stays.BoundAddr()).Port()), ReusePort: true}
	if err := goes.Listen(context.Background()); err != nil {
		return err
	}
	var clients []net.Conn
	for range 100 {
		c, err := net.DialTimeout("tcp", stays.BoundAddr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		clients = append(clients, c)
	}
	goes.Close()
	go stays.serve(context.Background(), echo)
	lost := 0
	for _, c := range clients {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		b := []byte{1}
		if _, err := c.Write(b); err == nil {
			_, err = c.Read(b)
			if err == nil {
				continue
			}
		}
		lost++
	}
	fmt.Println("lost", lost)
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}
