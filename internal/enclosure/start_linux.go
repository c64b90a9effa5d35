package enclosure

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Process is a command in an enclosure.
type Process struct {
	Device *tundev.Device // what the command's network ends in; the caller's
	NoIPv6 bool           // the kernel has none, and so the network has none

	inside  *os.File
	process *os.Process
	args    []string
}

// Start makes an enclosure for the command at path, whose arguments are args, args[0] its name. It inherits what this process
// has: standard files and others, directory, environment, terminal and process group. It does not run before Release, and is
// killed when this process dies.
//
// Start and Wait have to be called by the same goroutine.
func Start(path string, args []string, n Network) (*Process, error) {
	if err := canOpenTUN(); err != nil {
		return nil, err
	}
	outside, inside, err := socketpair()
	if err != nil {
		return nil, fmt.Errorf("enclosure: %w", err)
	}
	defer inside.Close()
	number := strconv.Itoa(int(inside.Fd()))
	runtime.LockOSThread() // the child's parent is this thread: the child dies with it
	process, err := os.StartProcess("/proc/self/exe", append([]string{os.Args[0], InsideName, number, path}, args...),
		&os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: namespaces()})
	if err != nil {
		runtime.UnlockOSThread()
		outside.Close()
		return nil, explain(fmt.Errorf("enclosure: %w", err))
	}
	inside.Close()
	p := &Process{inside: outside, process: process, args: args}
	if err := p.build(n); err != nil {
		p.Kill()
		p.Wait()
		return nil, explain(fmt.Errorf("enclosure: %w", err))
	}
	return p, nil
}

// namespaces says what is to be new for the child. Who may make namespaces has no need of another user namespace,
// and stays what it is. Others need one to be masters in; in it they have the user and group that they have outside.
func namespaces() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  unix.SIGKILL,
	}
	if isMaster() {
		return attr
	}
	uid, gid := os.Geteuid(), os.Getegid()
	attr.Cloneflags |= unix.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
	attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN}
	return attr
}

// isMaster says whether this process may make and set up namespaces.
func isMaster() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return false
	}
	const needed = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN
	return caps[0].Effective&needed == needed
}

// build has the inside build its network, and takes the device.
func (p *Process) build(n Network) error {
	if err := send(p.inside, n, -1); err != nil {
		return err
	}
	var a answer
	file, err := receive(p.inside, &a)
	switch {
	case err != nil:
		err = fmt.Errorf("the inside has died: %w", err)
	case a.err() != nil:
		err = a.err()
	case file == nil:
		err = errors.New("no device came")
	}
	if err != nil {
		if file != nil {
			file.Close()
		}
		return err
	}
	p.NoIPv6 = a.NoIPv6
	p.Device, err = tundev.FromFile(file, a.MTU)
	return err
}

// Release lets the command run. The error is a [*CommandError] where it cannot; Wait is still to be called.
func (p *Process) Release() error {
	var a answer
	err := send(p.inside, struct{}{}, -1)
	if err == nil {
		_, err = receive(p.inside, &a)
	}
	p.inside.Close()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return nil // it has become the command, or has died, which Wait tells
	case err != nil:
		return fmt.Errorf("enclosure: %w", err)
	case a.Command:
		return &CommandError{p.args[0], a.Errno}
	}
	return fmt.Errorf("enclosure: %w", a.err())
}

// Signal sends sig to the command.
func (p *Process) Signal(sig os.Signal) error { return p.process.Signal(sig) }

// Kill ends the command, also one that was not released.
func (p *Process) Kill() { p.process.Kill() }

// settling is how long it may take until all processes of a group have been stopped, or continued, that are
// to be.
const settling = 100 * time.Millisecond

// Wait waits for the end of the command. A command that stops itself, and not the process group that this process is
// in too, stops this process: who waits for this one, as a shell, is to see it.
func (p *Process) Wait() (unix.WaitStatus, error) {
	defer runtime.UnlockOSThread()
	defer p.inside.Close()
	defer p.process.Release()
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, p.process.Pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT, nil)
		stopped := err == nil && info.Code == cldStopped
		if stopped {
			time.Sleep(settling)
		}
		var status unix.WaitStatus
		if err == nil {
			var pid int
			pid, err = unix.Wait4(p.process.Pid, &status, unix.WNOHANG|unix.WUNTRACED, nil)
			stopped = stopped && pid > 0 && status.Stopped()
			if err == nil && pid > 0 && !status.Stopped() {
				return status, nil
			}
		}
		switch {
		case err != nil && err != unix.EINTR:
			return 0, fmt.Errorf("enclosure: wait: %w", err)
		case stopped:
			p.stop()
		}
	}
}

// stop stops this process, and when that goes on, the command. A shell that stops itself had the terminal for a process
// group of its own, which who waits for us knows nothing of: it gets the terminal back.
func (p *Process) stop() {
	tty, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	group := 0
	if err == nil {
		defer unix.Close(tty)
		group, err = unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	}
	unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP) // to this thread: it returns when all goes on
	if now, e := unix.Getpgid(p.process.Pid); err == nil && e == nil && now == group && now != unix.Getpgrp() {
		if foreground, e := unix.IoctlGetInt(tty, unix.TIOCGPGRP); e == nil && foreground == unix.Getpgrp() {
			unix.IoctlSetPointerInt(tty, unix.TIOCSPGRP, group)
		}
	}
	p.process.Signal(unix.SIGCONT)
}

// cldStopped is CLD_STOPPED of waitid(2).
const cldStopped = 5
