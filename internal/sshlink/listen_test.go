//go:build unix

package sshlink

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// serveEcho accepts streams and echoes, until ln is closed.
func serveEcho(ln *Listener) (wait func()) {
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				c, err := c.(*Incoming).Accept()
				if err != nil {
					return
				}
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	return all.Wait
}

func dialEcho(network, address string) error {
	c, err := net.DialTimeout(network, address, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	return echo(c)
}

func TestListenOnTheServer(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	for _, address := range []string{"127.0.0.1:0", "localhost:0", ":0"} {
		ln, err := l.Listen(withTimeout(t), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		if port == "0" {
			t.Errorf("listening at %v", ln.Addr())
		}
		wait := serveEcho(ln)
		for range 3 {
			if err := dialEcho("tcp", "127.0.0.1:"+port); err != nil {
				t.Errorf("%s: %v", address, err)
			}
		}
		ln.Close()
		wait()
		proxytest.Until(t, "the server listens no more", func() bool { return dialEcho("tcp", "127.0.0.1:"+port) != nil })
	}
}

func TestListenAtAUnixSocketOfTheServer(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t, "StreamLocalBindUnlink yes")
	l, _ := newLink(t, s)
	path := filepath.Join(s.Dir, "far.sock")
	ln, err := l.Listen(withTimeout(t), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	wait := serveEcho(ln)
	if err := dialEcho("unix", path); err != nil {
		t.Error(err)
	}
	ln.Close()
	wait()
}

func TestStreamsAreRefusedAtTheServer(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	ln, err := l.Listen(withTimeout(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		c.(*Incoming).Reject(syscall.ECONNREFUSED)
		if _, err := c.(*Incoming).Accept(); err == nil {
			t.Error("a stream was accepted that was rejected")
		}
	})
	c := proxytest.Dial(t, parse(t, ln.Addr().String()))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d, %v", n, err)
	}
	all.Wait()
	ln.Close()
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestListenIsRefused(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	if _, err := l.Listen(withTimeout(t), "tcp", s.Addr.HostPort()); !errors.Is(err, syscall.EACCES) {
		t.Error("an address in use:", err)
	}
	no := proxytest.StartSSHD(t, "AllowTcpForwarding local")
	l, _ = newLink(t, no)
	if _, err := l.Listen(withTimeout(t), "tcp", "127.0.0.1:0"); !errors.Is(err, syscall.EACCES) {
		t.Error("forwarding not allowed:", err)
	}
}

func TestListenersComeBackWithTheServer(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, book := newLink(t, s)
	ln, err := l.Listen(withTimeout(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	wait := serveEcho(ln)
	address := ln.Addr().String()
	if err := dialEcho("tcp", address); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s.Kill()
		proxytest.Until(t, "the link is down", func() bool { return !l.isUp() })
		s.Run()
		proxytest.Until(t, "the listener is back", func() bool { return dialEcho("tcp", address) == nil })
	}
	// Somebody else has the port when we come back: we get it when they are gone.
	s.Kill()
	proxytest.Until(t, "the link is down", func() bool { return !l.isUp() })
	other, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s.Run()
	proxytest.Until(t, "the refusal is logged", func() bool { return strings.Contains(book.String(), "cannot listen at the server") })
	other.Close()
	proxytest.Until(t, "the listener is back", func() bool { return dialEcho("tcp", address) == nil })
	proxytest.Until(t, "that is logged", func() bool { return strings.Contains(book.String(), "listening again") })
	ln.Close()
	wait()
}

func TestGatewayPorts(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t, "GatewayPorts clientspecified")
	l, _ := newLink(t, s)
	ln, err := l.Listen(withTimeout(t), "tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	wait := serveEcho(ln)
	if err := dialEcho("tcp", ln.Addr().String()); err != nil || !strings.HasPrefix(ln.Addr().String(), "127.0.0.2:") {
		t.Errorf("%v: %v", ln.Addr(), err)
	}
	ln.Close()
	wait()
}

func TestListenGivesUp(t *testing.T) {
	proxytest.NoLeaks(t)
	l := strange(t, proxytest.Sink)
	l.Settings.ConnectTimeout = time.Minute
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.Listen(ctx, "tcp", "127.0.0.1:0"); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}
