package transparent

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// What TestConform tells the test that it starts in the origin's namespace.
const (
	fromEnv = "SLUICE_TRANSPARENT_FROM" // the namespace of the clients
	pidEnv  = "SLUICE_TRANSPARENT_PID"  // of sluice
	toEnv   = "SLUICE_TRANSPARENT_TO"   // where the origin is to listen
	onlyEnv = "SLUICE_TRANSPARENT_ONLY" // what the names of the scenarios contain
)

// TestConform: all scenarios pass, as if there were no proxy. The origin must be in the namespace of the process that plays them, so
// they are played by another one.
func TestConform(t *testing.T) {
	for _, tt := range []struct {
		name   string
		args   []string
		client func(l *lab) namespace
		family int
		only   string
	}{
		{"redirect from a LAN", kinds[0].args, func(l *lab) namespace { return l.client }, 0, ""},
		{"redirect from this machine, IPv6", kinds[0].args, func(l *lab) namespace { return l.router }, 1, "reset"},
		{"tproxy from a LAN, IPv6", kinds[1].args, func(l *lab) namespace { return l.client }, 1, ""},
		{"tproxy from this machine", kinds[1].args, func(l *lab) namespace { return l.router }, 0, "reset"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			s := l.router.startSluice(t, append(tt.args, "--log-level", "error")...)
			cmd := exec.CommandContext(t.Context(), "ip", "netns", "exec", string(l.origin), os.Args[0], "-test.run", "^TestScenarios$", "-test.v")
			cmd.Env = append(os.Environ(), binaryEnv+"="+binary, fromEnv+"="+string(tt.client(l)),
				pidEnv+"="+strconv.Itoa(s.cmd.Process.Pid), toEnv+"="+at(originIP[tt.family], "8080"), onlyEnv+"="+tt.only)
			out, err := cmd.CombinedOutput()
			if played := strings.Count(string(out), "--- PASS: TestScenarios/"); err != nil || played < 5 {
				t.Errorf("%v, %d scenarios were passed\n%s", err, played, out)
			}
		})
	}
}

// TestScenarios is the part of TestConform that runs in the namespace of an origin.
func TestScenarios(t *testing.T) {
	from, to := namespace(os.Getenv(fromEnv)), os.Getenv(toEnv)
	if from == "" {
		return // TestConform runs it
	}
	pid, err := strconv.Atoi(os.Getenv(pidEnv))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	relaytest.RunBed(t, &relaytest.Dialed{
		Origin:  ln,
		Connect: func(ctx context.Context) (net.Conn, error) { return from.dial(ctx, "tcp", to) },
		Meter:   relaytest.Processes(pid),
	}, relaytest.Options{
		Only:    os.Getenv(onlyEnv),
		Delay:   250 * time.Millisecond, // on a machine that has other things to do
		Bytes:   512 << 10,
		Rounds:  20,
		Silence: 100 * time.Millisecond,
		Prompt:  3 * time.Second,
		Timeout: 40 * time.Second,
	})
}
