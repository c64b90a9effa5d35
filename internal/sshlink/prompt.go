package sshlink

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/crypto/ssh"
)

// Prompt asks a person. Its methods return an error if that cannot be done, or when ctx ends.
type Prompt interface {
	// Line shows a question and returns what is typed.
	Line(ctx context.Context, question string) (string, error)
	// Secret is Line without showing what is typed.
	Secret(ctx context.Context, question string) (string, error)
}

// errNobody is why what would have to be asked is not asked.
var errNobody = errors.New("there is no terminal to ask at")

// asker asks during a handshake, whose clock stands still meanwhile.
type asker struct {
	prompt Prompt
	ctx    context.Context
	clock  *clock
}

func (a asker) ask(secret bool, question string) (string, error) {
	if a.prompt == nil {
		return "", errNobody
	}
	a.clock.pause()
	defer a.clock.resume()
	if secret {
		return a.prompt.Secret(a.ctx, question)
	}
	return a.prompt.Line(a.ctx, question)
}

// secrets are answers that a link remembers, so that it asks once and not at each connection.
type secrets struct {
	mu       sync.Mutex
	keys     map[string]ssh.Signer // of key files that have a passphrase, by path
	bad      map[string]bool       // key files whose passphrase nobody knows
	password string                // typed in last
	refused  map[string]bool       // host keys that a person has not accepted, by fingerprint
}

func (s *secrets) key(path string) ssh.Signer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[path]
}

func (s *secrets) setKey(path string, k ssh.Signer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = make(map[string]ssh.Signer)
	}
	s.keys[path] = k
}

func (s *secrets) isBad(path string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bad[path]
}

func (s *secrets) setBad(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bad == nil {
		s.bad = make(map[string]bool)
	}
	s.bad[path] = true
}

func (s *secrets) hasRefused(fingerprint string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused[fingerprint]
}

func (s *secrets) refuse(fingerprint string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused == nil {
		s.refused = make(map[string]bool)
	}
	s.refused[fingerprint] = true
}

func (s *secrets) lastPassword() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.password
}

func (s *secrets) setPassword(p string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.password = p
}
