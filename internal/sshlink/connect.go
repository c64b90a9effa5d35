package sshlink

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"golang.org/x/crypto/ssh"
)

// clientVersion is how we introduce ourselves, RFC 4253 section 4.2.
const clientVersion = "SSH-2.0-sluice"

// slowError is why a handshake is given up.
type slowError struct{ limit time.Duration }

func (e *slowError) Error() string {
	return fmt.Sprintf("the SSH handshake was not done within %v", e.limit)
}
func (*slowError) Timeout() bool   { return true }
func (*slowError) Temporary() bool { return true }

// finalError is a failure that waiting does not heal: the server is not who it should be, or does not want us.
type finalError interface{ final() }

func isFinal(err error) bool {
	var f interface {
		error
		finalError
	}
	return errors.As(err, &f)
}

// connect dials the server, verifies it and logs in. Time that people take to answer does not count.
func (l *Link) connect() (*session, error) {
	set := &l.Settings
	ctx, cancel := context.WithTimeoutCause(l.ctx, set.ConnectTimeout, context.DeadlineExceeded)
	conn, err := l.DialServer(ctx, set.HostName, set.Port)
	cancel()
	if err != nil {
		return nil, fmt.Errorf("server unreachable: %w", err)
	}
	w := newWire(conn)
	limit := newClock(set.ConnectTimeout, func() { w.fail(&slowError{set.ConnectTimeout}) })
	defer limit.stop()
	stop := context.AfterFunc(l.ctx, func() { w.Close() })
	defer stop()

	addr := net.JoinHostPort(set.keyName(), strconv.Itoa(int(set.Port)))
	ask := asker{l.whom(), l.ctx, limit}
	keys, err := set.hostKeys(addr, ask, l.Log)
	if err != nil {
		w.Close()
		return nil, err
	}
	keys.secrets = &l.secrets
	a := &auth{set: set, ask: ask, password: l.Password, secrets: &l.secrets, log: l.Log, server: l.Name}
	defer a.close()
	config := &ssh.ClientConfig{
		User:              set.User,
		AuthCallback:      a.next,
		HostKeyCallback:   keys.check,
		HostKeyAlgorithms: keys.algorithms,
		ClientVersion:     clientVersion,
		BannerCallback:    a.banner,
	}
	c, chans, requests, err := ssh.NewClientConn(w, addr, config)
	if err == nil && !stop() { // Close came between
		c.Close()
		err = ErrClosed
	}
	if err != nil {
		w.Close()
		_, slow := errors.AsType[*slowError](w.err)
		switch failed := a.failure(err); {
		case keys.err != nil:
			err = keys.err
		case slow:
			err = w.err
		case failed != nil:
			err = failed
		case w.err != net.ErrClosed:
			err = fmt.Errorf("the server closed the connection during the SSH handshake: %w", w.err)
		}
		return nil, err
	}
	return newSession(l, w, c, chans, requests), nil
}
