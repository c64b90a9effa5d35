package relaytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Leg is one of the two connections that a relay joins.
type Leg struct {
	Name string
	Caps Caps
	// Pair makes a connection and returns its two ends. Both can read under a deadline.
	Pair func(ctx context.Context) (end, relayed net.Conn, err error)
	// Relayed turns the relay's end into what the relay gets. Nil leaves it as it is.
	Relayed func(net.Conn) io.ReadWriteCloser
}

// Legs returns all legs that this package has.
func Legs() []Leg { return []Leg{TCP(), Unix(), TLS(), Stream(), Pipe()} }

// TCP is a connection over the loopback address; the relay gets a bare [net.TCPConn].
func TCP() Leg { return Leg{Name: "tcp", Caps: tcpCaps, Pair: tcpPair} }

func tcpPair(ctx context.Context) (a, b net.Conn, err error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	return pairOver(ctx, ln)
}

// Unix is a connection by a Unix socket; the relay gets a bare [net.UnixConn]. It has no reset.
func Unix() Leg { return Leg{Name: "unix", Caps: socketCaps, Pair: unixPair} }

func unixPair(ctx context.Context) (a, b net.Conn, err error) {
	dir, err := os.MkdirTemp("", "relaytest")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		return nil, nil, err
	}
	return pairOver(ctx, ln)
}

// pairOver dials ln, accepts that one connection, and closes ln.
func pairOver(ctx context.Context, ln net.Listener) (a, b net.Conn, err error) {
	defer ln.Close()
	var d net.Dialer
	if a, err = d.DialContext(ctx, ln.Addr().Network(), ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	if b, err = ln.Accept(); err != nil {
		a.Close()
		return nil, nil, err
	}
	if b.RemoteAddr().String() != a.LocalAddr().String() {
		a.Close()
		b.Close()
		return nil, nil, errors.New("relaytest: a stranger has connected to the test")
	}
	return a, b, nil
}

// TLS is a connection by TLS 1.3 over loopback TCP; the relay gets the [tls.Conn] of a server. Its
// half-close is a close_notify, its reset is that of the TCP connection.
func TLS() Leg {
	configs := sync.OnceValues(tlsConfigs)
	return Leg{Name: "tls", Caps: tcpCaps &^ Urgent, Pair: func(ctx context.Context) (a, b net.Conn, err error) {
		cfg, err := configs()
		if err != nil {
			return nil, nil, err
		}
		ta, tb, err := tcpPair(ctx)
		if err != nil {
			return nil, nil, err
		}
		ca, cb := tls.Client(ta, cfg.client), tls.Server(tb, cfg.server)
		if err := both(
			func() error { return ca.HandshakeContext(ctx) },
			func() error { return cb.HandshakeContext(ctx) },
		); err != nil {
			ta.Close()
			tb.Close()
			return nil, nil, fmt.Errorf("relaytest: TLS handshake: %w", err)
		}
		return ca, cb, nil
	}}
}

type tlsPair struct{ client, server *tls.Config }

func tlsConfigs() (tlsPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tlsPair{}, err
	}
	const name = "relaytest.invalid"
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		return tlsPair{}, err
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return tlsPair{}, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return tlsPair{
		client: &tls.Config{RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS13},
		server: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
			MinVersion:   tls.VersionTLS13,
			// A ticket that nobody has read would turn the close of a client into a reset.
			SessionTicketsDisabled: true,
		},
	}, nil
}

// Pipe is a [net.Pipe]. The relay gets an [io.ReadWriteCloser] and nothing more: no half-close, no
// reset, no deadlines, no buffer.
func Pipe() Leg {
	return Leg{
		Name: "pipe",
		Pair: func(context.Context) (a, b net.Conn, err error) {
			a, b = net.Pipe()
			return a, b, nil
		},
		Relayed: func(c net.Conn) io.ReadWriteCloser { return struct{ io.ReadWriteCloser }{c} },
	}
}
