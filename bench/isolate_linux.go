package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// insideEnv tells the benchmark that it already runs in namespaces of its own.
const insideEnv = "SLUICE_BENCH_INSIDE"

// isolated is a command that runs in new network, process and mount namespaces. When the benchmark
// dies in there, as process 1, the kernel kills everything that it has started.
func isolated(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	return cmd
}

// canIsolate tries the namespaces out and says why they cannot be had.
func canIsolate(self string) error {
	if os.Getuid() != 0 {
		return errors.New("not root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := isolated(exec.CommandContext(ctx, self, "-end", "isolate"))
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if out = bytes.TrimSpace(out); len(out) > 0 {
		return fmt.Errorf("%s", out)
	}
	return err
}

// isolateMain is canIsolate's other half.
func isolateMain() int {
	if err := settleIn(""); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// settleIn makes the new namespaces usable: a /proc that shows their processes, a /run of their own
// (sshd wants a directory there), a loopback interface, the congestion control if one is named, and a
// wide range of ports.
func settleIn(congestion string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	if congestion != "" {
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte(congestion), 0); err != nil {
			return fmt.Errorf("congestion control %s: %w", congestion, err)
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("10240 65535"), 0); err != nil {
		return fmt.Errorf("port range: %w", err)
	}
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
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		return err
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// adopt makes orphans of what the benchmark starts its own children, so that they can be reaped.
func adopt() { unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// openFiles raises the limit of open files for the benchmark and its children to what n idle relays can
// need, as far as that is allowed, and returns it.
func openFiles(n int) int {
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return 1024
	}
	lim.Cur = min(lim.Max, uint64(max(20000, 7*n+1000)))
	syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
	return int(lim.Cur)
}

func sysctl(name string) string {
	b, _ := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(b))
}
