package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestExecWhereItCannot: a system that does not let users do it is told apart from a failure, and the setting is named.
func TestExecWhereItCannot(t *testing.T) {
	t.Parallel()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "unshare", "setpriv")
	openDir(t)
	// In a user namespace of its own, a test may forbid what it likes.
	inside := func(script string) *exec.Cmd {
		cmd := exec.Command("unshare", "-Urm", "sh", "-ec", script, "sh", binary)
		cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
		return cmd
	}
	const powerless = `exec setpriv --bounding-set -all --inh-caps -all "$1" exec true`
	for name, tt := range map[string]struct {
		cmd  *exec.Cmd
		want string
	}{
		"no user namespaces": {
			inside("echo 0 >/proc/sys/user/max_user_namespaces; " + powerless),
			"user.max_user_namespaces=0: `sysctl -w user.max_user_namespaces=10000` as root allows it",
		},
		"no network namespaces": {
			inside("echo 0 >/proc/sys/user/max_net_namespaces; " + powerless),
			"user.max_net_namespaces=0: `sysctl -w user.max_net_namespaces=10000` as root allows it",
		},
		"no TUN": {
			inside(`mount -t tmpfs none /dev/net; exec "$1" exec true`),
			"sluice: /dev/net/tun: no such file or directory (the kernel's module tun is not there: `modprobe tun`",
		},
		"a /proc that cannot be written to": {
			inside("mount --rbind /proc /proc; mount -o remount,bind,ro /proc; " + powerless),
			"/proc is read-only here, as in a container",
		},
		"a root directory that is no mount point": {
			inside(`mount -t tmpfs none /mnt; for d in bin lib lib64 usr etc dev proc tmp; do mkdir -p /mnt/root/$d; mount --rbind /$d /mnt/root/$d; done
exec chroot /mnt/root "$1" exec true`),
			"the root directory is no mount point",
		},
		"a TUN for root": {
			userCommand(userOf(t, "", "chmod 600 /dev/net/tun"), "true"),
			"sluice: /dev/net/tun: permission denied (it should be open to everyone: `chmod 666 /dev/net/tun` as root)",
		},
	} {
		code, out, errOut := outcome(t, tt.cmd)
		if code != 1 || out != "" || !strings.HasPrefix(errOut, "sluice: ") || !strings.Contains(errOut, tt.want) {
			t.Errorf("%s: code %d, %s%s; want %s", name, code, out, errOut, tt.want)
		}
	}
}

// TestExecFindsItsNameserver: whatever a system has in place of a plain resolv.conf, the command asks the nameserver of its network,
// and no service that resolves names outside.
func TestExecFindsItsNameserver(t *testing.T) {
	t.Parallel()
	const resolvConf = "nameserver 198.18.0.2\nsearch .\n"
	for name, tt := range map[string]struct{ setup, script, want string }{
		"no file":           {"rm $etc/resolv.conf", "", resolvConf},
		"a link to nowhere": {"ln -sf ../run/nowhere/resolv.conf $etc/resolv.conf", "", resolvConf},
		"systemd-resolved": {
			`mkdir -p $run/systemd/resolve; touch $run/systemd/resolve/io.systemd.Resolve
echo nameserver 127.0.0.53 >$run/systemd/resolve/stub-resolv.conf
ln -sf ../run/systemd/resolve/stub-resolv.conf $etc/resolv.conf
echo 'hosts: mymachines resolve [!UNAVAIL=return] files myhostname dns' >$etc/nsswitch.conf`,
			"ls /run/systemd/resolve; cat /etc/nsswitch.conf", "resolv.conf\nstub-resolv.conf\nhosts: files myhostname dns\n" + resolvConf,
		},
		"resolvconf": {
			`mkdir $run/resolvconf; echo nameserver 9.9.9.9 >$run/resolvconf/resolv.conf
ln -sf ../run/resolvconf/resolv.conf $etc/resolv.conf`, "", resolvConf,
		},
		"nscd":                    {"mkdir $run/nscd; touch $run/nscd/socket", "ls /run/nscd", resolvConf},
		"a file that only we see": {"umask 077", "", resolvConf},
	} {
		dir := openDir(t)
		for _, d := range []string{"etc", "run"} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		setup := "etc=" + dir + "/etc; run=" + dir + "/run; cp /etc/passwd /etc/group /etc/nsswitch.conf $etc\n" +
			"echo nameserver 9.9.9.9 >$etc/resolv.conf\n" + tt.setup + "\nmount --bind $etc /etc; mount --bind $run /run"
		u := userOf(t, "", strings.ReplaceAll(setup, "'", `'\''`))
		t.Log(name)
		wants(t, userCommand(u, "sh", "-c", tt.script+"\ngrep -v '^#' /etc/resolv.conf"), tt.want)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/etc/resolv.conf", &st); err != nil || st.Type == unix.TMPFS_MAGIC {
		t.Errorf("outside, /etc/resolv.conf is on a file system of type %#x, %v", st.Type, err)
	}
}

// TestExecRoot: root stays root, with all its rights, and needs no user namespace.
func TestExecRoot(t *testing.T) {
	t.Parallel()
	proxytest.NeedRoot(t)
	own, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	proxytest.Need(t, "setpriv")
	cmd := exec.Command(binary, "exec", "sh", "-c", "readlink /proc/self/ns/user; id -u; setpriv --reuid 12345 --clear-groups id -u")
	wants(t, cmd, own+"\n0\n12345\n")
}
