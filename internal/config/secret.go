package config

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/sluice-proxy/sluice/internal/inbound"
)

// secrets reads what must not stand in a configuration. Each file is read once, so that it may be a
// pipe. Errors name places, never contents.
type secrets struct {
	dir       string
	lookupEnv func(string) (string, bool)
	files     map[string][]byte
}

// get returns the contents of the file or of the environment variable that is named.
func (s *secrets) get(file, env string) ([]byte, error) {
	if file != "" {
		return s.file(file)
	}
	v, ok := s.lookupEnv(env)
	switch {
	case !ok:
		return nil, fmt.Errorf("the environment variable %s is not set", env)
	case v == "":
		return nil, fmt.Errorf("the environment variable %s is empty", env)
	}
	return []byte(v), nil
}

func (s *secrets) file(name string) ([]byte, error) {
	path := s.path(name)
	if data, ok := s.files[path]; ok {
		return data, nil
	}
	data, mode, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" && mode.IsRegular() && mode.Perm()&0o004 != 0 {
		return nil, fmt.Errorf("%s can be read by every user of this machine: run chmod 600 %s", path, path)
	}
	if len(data) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	s.files[path] = data
	return data, nil
}

// path returns where the file is that the configuration calls name.
func (s *secrets) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(s.dir, name)
}

// password returns the first and only line of a file or variable.
func (s *secrets) password(file, env string) (string, error) {
	data, err := s.get(file, env)
	if err != nil {
		return "", err
	}
	p := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	switch {
	case p == "":
		return "", errors.New("the password is empty")
	case strings.ContainsAny(p, "\r\n\x00"):
		return "", errors.New("the password is more than one line")
	case len(p) > 255:
		return "", errors.New("the password is longer than 255 bytes")
	}
	return p, nil
}

// users returns the list of users in a file or variable: lines of name:password. Empty lines and
// lines that begin with # are skipped. The errors are all that is wrong with it.
func (s *secrets) users(file, env string) (inbound.Users, []error) {
	data, err := s.get(file, env)
	if err != nil {
		return nil, []error{err}
	}
	place := "variable " + env
	if file != "" {
		place = s.path(file)
	}
	users, n := inbound.Users{}, 0
	var errs []error
	for line := range bytes.Lines(data) {
		n++
		text := strings.TrimRight(string(line), "\r\n")
		if text == "" || text[0] == '#' {
			continue
		}
		name, password, ok := strings.Cut(text, ":")
		_, twice := users[name]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("%s:%d: not of the form name:password", place, n))
		case name == "" || password == "":
			errs = append(errs, fmt.Errorf("%s:%d: neither the name nor the password may be empty", place, n))
		case len(name) > 255 || len(password) > 255:
			errs = append(errs, fmt.Errorf("%s:%d: name and password are 255 bytes at most", place, n))
		case twice:
			errs = append(errs, fmt.Errorf("%s:%d: user %s is there already", place, n, name))
		default:
			users[name] = password
		}
	}
	if len(errs) == 0 && len(users) == 0 {
		errs = append(errs, fmt.Errorf("%s: no users in it", place))
	}
	return users, errs
}

// roots returns the certificates in the PEM file called name.
func (s *secrets) roots(name string) (*x509.CertPool, error) {
	path := s.path(name)
	data, _, err := readFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s: no PEM certificate in it", path)
	}
	return pool, nil
}

func readFile(path string) ([]byte, os.FileMode, error) { return readUpTo(path, maxFile) }

func readUpTo(path string, most int) ([]byte, os.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err == nil && len(data) > most {
		err = fmt.Errorf("%s is larger than %d MiB", path, most>>20)
	}
	return bytes.TrimPrefix(data, byteOrderMark), fi.Mode(), err
}

// byteOrderMark is what editors on Windows begin a text with. It belongs to no first word.
var byteOrderMark = []byte("\xef\xbb\xbf")
