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
	"time"

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

// TestLogReaderStalls: who reads the log may read no more, as a pager does when its page is full. Clients are served
// nevertheless, sessions give back their places, and a signal ends the program.
func TestLogReaderStalls(t *testing.T) {
	log, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := w.Write(make([]byte, 4<<20)); n == 0 || err == nil {
		t.Fatalf("the pipe took %d bytes, %v", n, err)
	}
	cmd := exec.Command("sluice", "forward", "0", "127.0.0.1:1", "--max-conns", "1")
	cmd.Env = append(os.Environ(), "GORACE="+quickExit)
	cmd.Stderr = w
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	watchdog := time.AfterFunc(proxytest.Patience, func() { cmd.Process.Kill() })
	defer watchdog.Stop()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	addr := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if err != nil || addr == "" {
		t.Fatalf("%q, %v", line, err)
	}
	for i := range 3 {
		c, err := net.DialTimeout("tcp", addr, proxytest.Patience)
		switch {
		case errors.Is(err, syscall.ECONNRESET): // the origin has refused before the dial has looked
			continue
		case err != nil:
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(proxytest.Patience / 2))
		if !proxytest.Resets(c) {
			t.Errorf("client %d was not served", i)
		}
		c.Close()
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
