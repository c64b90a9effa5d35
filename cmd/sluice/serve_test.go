package main

import (
	"bufio"
	"errors"
	"net"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestLogReaderGone: who reads the log may go first, as tee does at Ctrl-C. What was changed of the machine's network is
// undone nevertheless, so sluice must not end by SIGPIPE.
func TestLogReaderGone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sluice", "forward", "0", "127.0.0.1:1")
	cmd.Stdout, cmd.Stderr = w, w
	cmd.Env = append(os.Environ(), "GORACE="+quickExit)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(r).ReadString('\n')
	addr := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if err != nil || addr == "" {
		t.Fatalf("%q, %v", line, err)
	}
	r.Close()
	c, err := net.DialTimeout("tcp", addr, proxytest.Patience)
	switch {
	case err == nil:
		proxytest.Resets(c) // the origin refuses, which is logged
		c.Close()
	case !errors.Is(err, syscall.ECONNRESET): // the same, before the dial has looked
		t.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
