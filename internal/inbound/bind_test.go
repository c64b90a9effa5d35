//go:build linux

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
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestPortInUseNamesTheCulprit(t *testing.T) {
	port := proxytest.FreePort(t)
	addr := proxy.TCP("127.0.0.1", port)
	cmd := proxytest.Start(t, addr.HostPort(), "python3", "-m", "http.server", "-b", "127.0.0.1", fmt.Sprint(port))
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%v is in use by %s (pid %d)", addr, strings.TrimSpace(string(name)), cmd.Process.Pid)
	err = (&Listener{Addr: addr}).Listen(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("got %v\nwant … %s", err, want)
	}
	// The same port on all addresses conflicts too.
	err = (&Listener{Addr: proxy.TCP("", port)}).Listen(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", cmd.Process.Pid)) {
		t.Errorf("all addresses: %v", err)
	}
}

func TestBindErrors(t *testing.T) {
	taken := &Listener{Addr: loopback}
	start(t, t.Context(), taken, echo)
	taken6 := &Listener{Addr: proxy.TCP("::1", 0)}
	start(t, t.Context(), taken6, echo)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("keep me"), 0o600); err != nil {
		t.Fatal(err)
	}
	port := addrPort(taken.BoundAddr()).Port()
	for _, test := range []struct {
		addr  proxy.Addr
		errno error
		want  string
	}{
		{proxy.TCP("127.0.0.1", port), syscall.EADDRINUSE, "in use by this process already"},
		{proxy.TCP("::1", addrPort(taken6.BoundAddr()).Port()), syscall.EADDRINUSE, "in use by this process already"},
		{proxy.TCP("192.0.2.1", 0), syscall.EADDRNOTAVAIL, "this machine has no address 192.0.2.1"},
		{unixAddr(file), syscall.EADDRINUSE, "a file that is not a socket"},
		{unixAddr(filepath.Join(dir, "no", "s")), syscall.ENOENT, "no such directory"},
		{proxy.Addr{}, nil, "no address to listen at"},
		{proxy.Addr{Network: "udp", Host: "127.0.0.1"}, errors.ErrUnsupported, "cannot listen at"},
	} {
		l := &Listener{Addr: test.addr}
		err := l.Listen(t.Context())
		if err == nil {
			l.Close()
			t.Errorf("%v: no error", test.addr)
			continue
		}
		if !strings.Contains(err.Error(), test.want) || test.errno != nil && !errors.Is(err, test.errno) {
			t.Errorf("%v: %v, want %q", test.addr, err, test.want)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "keep me" {
		t.Error("a file that is no socket was touched")
	}
	if err := taken.Listen(t.Context()); err == nil {
		t.Error("Listen twice: no error")
	}
}

// TestLowPort runs itself as a user without privileges.
func TestLowPort(t *testing.T) {
	if os.Getenv("SLUICE_TEST_LOW_PORT") != "" {
		fmt.Println((&Listener{Addr: proxy.TCP("127.0.0.1", 19)}).Listen(context.Background()))
		os.Exit(0)
	}
	proxytest.NeedRoot(t)
	if b, _ := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); strings.TrimSpace(string(b)) != "1024" {
		t.Skip("this system lets everybody have low ports")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLowPort$") // wherever the user may not look
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "SLUICE_TEST_LOW_PORT=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "127.0.0.1:19: ports below 1024 need privileges") ||
		!strings.Contains(string(out), "setcap") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUnixSocketFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := &Listener{Addr: unixAddr(path)}
	start(t, t.Context(), l, echo)
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	err := (&Listener{Addr: unixAddr(path)}).Listen(t.Context())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "in use by this process") {
		t.Errorf("a live socket: %v", err)
	}
	dial(t, l.BoundAddr()) // it was left alone
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	open := &Listener{Addr: unixAddr(path), Mode: 0o666}
	start(t, t.Context(), open, echo)
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o666 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestStaleUnixSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false) // as a process that was killed
	ln.Close()
	l := &Listener{Addr: unixAddr(path)}
	dial(t, start(t, t.Context(), l, echo))
}

func TestKeepAliveAndNoDelay(t *testing.T) {
	got := make(chan [4]int, 1)
	a := start(t, t.Context(), &Listener{Addr: loopback}, func(ctx context.Context, c *client) {
		var v [4]int
		raw, _ := c.Conn().(*net.TCPConn).SyscallConn()
		raw.Control(func(fd uintptr) {
			v[0], _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
			v[1], _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY)
			v[2], _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE)
			v[3], _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL)
		})
		got <- v
		echo(ctx, c)
	})
	dial(t, a)
	if v := <-got; v[0] != 1 || v[1] != 1 || v[2] < 10 || v[2] > 15 || v[3] < 4 || v[3] > 6 {
		t.Errorf("keepalive, nodelay, idle, interval: %v", v)
	}
}
