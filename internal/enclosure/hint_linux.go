package enclosure

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// explain adds to err what a person can do about it, as far as the system tells.
func explain(err error) error {
	refused := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
	hint := ""
	switch {
	case isMaster():
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		hint = "no more user namespaces can be made: see `sysctl user.max_user_namespaces`"
		for _, kind := range []string{"user", "net", "mnt"} {
			if key := "user/max_" + kind + "_namespaces"; sysctl(key) == "0" {
				hint = "this system forbids it by user.max_" + kind + "_namespaces=0: `sysctl -w user.max_" + kind +
					"_namespaces=10000` as root allows it"
			}
		}
	case errors.Is(err, unix.EROFS):
		hint = "/proc is read-only here, as in a container: to make a user namespace needs to write to it"
	case !refused && !errors.Is(err, unix.EINVAL):
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		hint = "this system forbids user namespaces: `sysctl -w kernel.unprivileged_userns_clone=1` as root allows them"
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		hint = "AppArmor forbids user namespaces: `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` as root allows them"
	case hasFileCaps():
		hint = "the program's file has capabilities, which keep it from being a master in a user namespace: " +
			"use a copy without them (cp does not take them along)"
	case refused:
		hint = "this system, or the container that this runs in, does not let users make namespaces (user, network, mount)"
	case errors.Is(err, unix.EINVAL):
		hint = "this kernel has no user namespaces"
	}
	if hint == "" {
		return err
	}
	return fmt.Errorf("%w (%s)", err, hint)
}

func sysctl(key string) string {
	b, _ := os.ReadFile("/proc/sys/" + key)
	return strings.TrimSpace(string(b))
}

func hasFileCaps() bool {
	n, err := unix.Getxattr("/proc/self/exe", "security.capability", nil)
	return err == nil && n > 0
}

// canOpenTUN says what is wrong where no device can be had, before anything is done.
func canOpenTUN() error {
	const name = "/dev/net/tun"
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		return unix.Close(fd)
	}
	hint := ""
	switch err {
	case unix.ENOENT, unix.ENODEV, unix.ENXIO:
		hint = " (the kernel's module tun is not there: `modprobe tun` as root loads it; a container needs --device " + name + ")"
	case unix.EACCES, unix.EPERM:
		hint = " (it should be open to everyone: `chmod 666 " + name + "` as root)"
	}
	return fmt.Errorf("enclosure: %s: %w%s", name, err, hint)
}
