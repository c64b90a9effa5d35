package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestLoopForEachProcessor: a program that joins sockets of the kernel has a loop, which is an epoll, for each processor,
// unless it is told how many processors to use.
func TestLoopForEachProcessor(t *testing.T) {
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "GOMAXPROCS=") })
	for _, tt := range []struct {
		args  []string
		procs string
		loops int
	}{
		{[]string{"forward", "0", "127.0.0.1:1"}, "", runtime.GOMAXPROCS(0)},
		{[]string{"forward", "0", "127.0.0.1:1"}, "6", 3},
		{[]string{"forward", "0", "127.0.0.1:1", "--via", "https://127.0.0.1:1"}, "", max(1, runtime.GOMAXPROCS(0)/2)},
	} {
		t.Run(strings.Join(append(tt.args, tt.procs), " "), func(t *testing.T) {
			cmd := exec.Command("sluice", tt.args...)
			cmd.Env = append(env, "GORACE="+quickExit)
			if tt.procs != "" {
				cmd.Env = append(cmd.Env, "GOMAXPROCS="+tt.procs)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stderr = cmd.Stdout
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				t.Fatalf("%q, %v", line, err)
			}
			proxytest.Until(t, fmt.Sprint("there are ", tt.loops, " loops"), func() bool {
				polls := -1 // one is the runtime's
				fds, _ := proxytest.Descriptors(cmd.Process.Pid)
				for _, fd := range fds {
					if strings.HasSuffix(fd, " anon_inode:[eventpoll]") {
						polls++
					}
				}
				return polls == tt.loops
			})
		})
	}
}
