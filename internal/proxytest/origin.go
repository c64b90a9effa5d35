package proxytest

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// Origin is a server at the far end of a relay.
type Origin struct {
	Addr  proxy.Addr
	Roots *x509.CertPool // of a TLS origin: what a client must trust

	ln   net.Listener
	all  sync.WaitGroup
	mu   sync.Mutex
	open map[net.Conn]struct{} // nil once closed
	n    int
	peer net.Addr
}

// Listen starts an origin on loopback that runs serve for each conn, in a goroutine of its own, and then
// closes the conn. The network is "tcp", "tcp6", "unix", or "tls" (over TCP; its certificate is for
// localhost and the loopback addresses). At the test's end it closes all and waits for serve to return.
func Listen(t testing.TB, network string, serve func(net.Conn)) *Origin {
	t.Helper()
	o := &Origin{open: make(map[net.Conn]struct{})}
	var err error
	switch network {
	case "tcp":
		o.ln, err = net.Listen("tcp", "127.0.0.1:0")
	case "tcp6":
		o.ln, err = net.Listen("tcp", "[::1]:0")
	case "unix":
		o.ln, err = net.Listen("unix", filepath.Join(shortTempDir(t), "origin"))
	case "tls":
		var cert tls.Certificate
		cert, o.Roots = Certificate(t)
		o.ln, err = tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	default:
		t.Fatalf("proxytest: no origin speaks %q", network)
	}
	if err != nil {
		t.Fatal(err)
	}
	switch a := o.ln.Addr().(type) {
	case *net.TCPAddr:
		o.Addr = proxy.TCP(a.IP.String(), uint16(a.Port))
	case *net.UnixAddr:
		o.Addr = proxy.Addr{Network: "unix", Host: a.Name}
	}
	o.all.Go(func() { o.accept(serve) })
	t.Cleanup(o.close)
	return o
}

// shortTempDir is a directory whose paths are short enough for a Unix socket, whatever the test's name.
func shortTempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "sluice")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Accepted returns how many conns the origin has accepted.
func (o *Origin) Accepted() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.n
}

// Peer returns the other end of the conn accepted last.
func (o *Origin) Peer() net.Addr {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.peer
}

func (o *Origin) accept(serve func(net.Conn)) {
	for {
		c, err := o.ln.Accept()
		if err != nil {
			return
		}
		o.mu.Lock()
		if o.open == nil {
			o.mu.Unlock()
			c.Close()
			return
		}
		o.open[c] = struct{}{}
		o.n++
		o.peer = c.RemoteAddr()
		o.mu.Unlock()
		o.all.Go(func() { o.serve(c, serve) })
	}
}

func (o *Origin) serve(c net.Conn, serve func(net.Conn)) {
	serve(c)
	c.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, c)
}

func (o *Origin) close() {
	o.ln.Close()
	o.mu.Lock()
	for c := range o.open {
		c.SetDeadline(time.Now()) // serve closes it
	}
	o.open = nil
	o.mu.Unlock()
	o.all.Wait()
}

// Echo gives back what it reads, and half-closes when the client has.
func Echo(c net.Conn) {
	if _, err := io.Copy(c, c); err == nil {
		closeWrite(c)
	}
}

// Sink reads all and writes nothing.
func Sink(c net.Conn) { io.Copy(io.Discard, c) }

// Chargen returns an origin's serve that writes n bytes of [Pattern], half-closes, and reads to the end.
func Chargen(n int64) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := io.CopyN(c, Pattern(), n); err == nil {
			closeWrite(c)
			Sink(c)
		}
	}
}

// AfterEOF returns an origin's serve that reads its request to the half-close, and only then answers.
func AfterEOF(answer func(request []byte) []byte) func(net.Conn) {
	return func(c net.Conn) {
		if b, err := io.ReadAll(c); err == nil {
			c.Write(answer(b))
		}
	}
}

// Abort is an origin's serve that waits for a first byte and then resets the conn.
func Abort(c net.Conn) {
	c.Read(make([]byte, 1))
	relay.Abort(c)
}

func closeWrite(c net.Conn) {
	if h, ok := c.(relay.HalfCloser); ok {
		h.CloseWrite()
	}
}

// Pattern returns an endless reader of bytes that do not repeat at any power of two, so that a byte lost or
// a block swapped shows.
func Pattern() io.Reader { return new(pattern) }

type pattern struct{ at uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(p.at % 251)
		p.at++
	}
	return len(b), nil
}

// Certificate makes a throwaway certificate for localhost, 127.0.0.1 and ::1, and the roots to trust it by.
func Certificate(t testing.TB) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: "localhost"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots
}

// CertificateFiles writes a [Certificate] and its key as PEM files, for programs. The first file holds both,
// as HAProxy wants it; the second the certificate alone, to be trusted.
func CertificateFiles(t testing.TB) (both, certOnly string) {
	t.Helper()
	cert, _ := Certificate(t)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	dir := t.TempDir()
	both, certOnly = filepath.Join(dir, "both.pem"), filepath.Join(dir, "cert.pem")
	if err := os.WriteFile(certOnly, certPEM, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(both, append(certPEM, keyPEM...), 0o600); err != nil {
		t.Fatal(err)
	}
	return both, certOnly
}

// AfterHeader returns an origin's serve that reads to the first empty line, as that at the end of an HTTP
// request without a body, and then answers and closes.
func AfterHeader(answer string) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if line == "\r\n" {
				io.WriteString(c, answer)
				return
			}
		}
	}
}
