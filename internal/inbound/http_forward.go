package inbound

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/connect"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// The limits of a client that forwards plain requests.
const (
	maxHeader      = 64 << 10        // bytes of a request's head
	requestKeep    = 4 * time.Minute // how long it may be silent between two requests
	originKeep     = 90 * time.Second
	continueWait   = time.Second     // for an origin's 100 (Continue); then the content is sent anyway
	originsLinger  = 2 * time.Second // for origins to close their side after the client has left
	originsPerHost = 2               // idle ones
)

// forwarding is a client that has begun with a plain request. net/http reads its requests and sends
// them to their origins; what it dials are sessions of the handler.
type forwarding struct {
	http    *HTTP
	handler proxy.Handler
	client  *client
	conn    *httpConn
	ctx     context.Context // of the sessions with origins
	abort   context.CancelFunc
	begun   bool   // a request has come
	end     func() // ends the service of requests

	proxy     httputil.ReverseProxy
	transport *http.Transport // of user; nil before the first request
	user      string          // of the request that is being served

	mu      sync.Mutex
	ended   bool // no more sessions
	origins sync.WaitGroup

	tunnel *tunnel // the CONNECT that the client has ended its plain requests with
}

// serveForward serves a client that begins with a plain request.
func (s *HTTP) serveForward(ctx context.Context, h proxy.Handler, c *client, got []byte) {
	sessions, abort := context.WithCancel(ctx)
	defer abort()
	f := &forwarding{http: s, handler: h, client: c, ctx: sessions, abort: abort}
	watched, unwatch := relay.ResetContext(ctx, c.bare)
	f.conn = &httpConn{Conn: c.bare, client: c, head: got, lost: watched.Done(), interrupt: make(chan struct{}, 1)}
	errorLog := slog.NewLogLogger(c.l.s.log.Handler(), slog.LevelDebug)
	f.proxy = httputil.ReverseProxy{
		Rewrite:       rewrite,
		FlushInterval: -1,
		BufferPool:    copyBuffers{},
		ErrorLog:      errorLog,
		ErrorHandler:  f.failed,
	}
	one := &oneConn{conn: f.conn, stopping: c.l.s.closed, done: make(chan struct{})}
	f.end = one.end
	one.server = http.Server{
		Handler:                      f,
		ConnState:                    one.state,
		ReadHeaderTimeout:            cmp.Or(c.l.HandshakeTimeout, DefaultHandshakeTimeout),
		IdleTimeout:                  requestKeep,
		MaxHeaderBytes:               maxHeader,
		ErrorLog:                     errorLog,
		DisableGeneralOptionsHandler: true,
	}
	stop := context.AfterFunc(watched, f.lost)
	one.server.Serve(one) // its error is that of oneConn.Accept
	stop()
	unwatch()

	f.closeIdle()
	switch {
	case f.tunnel != nil:
		h.HandleStream(ctx, c.flow(f.tunnel.dst, f.user), f.tunnel)
		f.endOrigins()
	case f.begun:
		f.endOrigins()
		c.Done()
	default:
		c.fail(errors.New("inbound: http: the client sent no request that could be read"))
	}
}

// lost ends everything at once: the client has reset its conn, which shows also where nobody reads
// from it, or the inbound's context is cancelled.
func (f *forwarding) lost() {
	f.conn.broken.Store(true)
	f.abort()
	f.client.abort()
}

// endOrigins waits for the sessions with origins. Those that do not end by themselves, now that
// their conns are closed, are aborted.
func (f *forwarding) endOrigins() {
	f.mu.Lock()
	f.ended = true
	f.mu.Unlock()
	limit := time.AfterFunc(originsLinger, f.abort)
	defer limit.Stop()
	f.origins.Wait()
}

// ServeHTTP serves one request.
func (f *forwarding) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer f.endIfTaken()
	if f.conn.spent.Load() { // what looks like a request may be content
		panic(http.ErrAbortHandler)
	}
	f.serve(w, r)
	f.endContent(r)
}

func (f *forwarding) serve(w http.ResponseWriter, r *http.Request) {
	if !f.begun {
		if err := f.client.handshook(); err != nil {
			panic(http.ErrAbortHandler)
		}
		f.begun = true
	}
	user, err := f.authorize(r)
	if err != nil {
		f.client.l.s.stranger(slog.LevelInfo, "request refused", "client", f.client.peer, "err", err)
		refuse(w, r, unauthorized)
		return
	}
	f.setUser(user)
	if r.Method == http.MethodConnect {
		f.connect(w, r)
		return
	}
	if _, err := httpOrigin(r.URL); err != nil {
		answer, _ := connect.RefusalOf(err)
		refuse(w, r, answer)
		return
	}
	// An answer may begin, and be read, before the request is complete.
	http.NewResponseController(w).EnableFullDuplex()
	defer f.abortIfTorn(w)
	f.proxy.ServeHTTP(&httpWriter{w, f}, r)
}

// endContent reads what is left of the content of a request that was answered before that was complete: for a moment, after which the conn
// is not good for another request. It does so before the handler returns, since net/http cannot bear that the content ends later.
func (f *forwarding) endContent(r *http.Request) {
	if r.ContentLength == 0 || f.conn.taken.Load() {
		return
	}
	f.conn.SetReadDeadline(time.Now().Add(hangUpTime))
	if r.Body.Close() != nil {
		f.conn.spent.Store(true)
	}
}

// setUser says whose the next request is. No two users share a conn to an origin: each was routed for one.
func (f *forwarding) setUser(user string) {
	if f.transport != nil && f.user == user {
		return
	}
	f.closeIdle()
	f.user = user
	f.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return f.dial(ctx, addr, user)
		},
		DisableCompression:    true,
		MaxIdleConnsPerHost:   originsPerHost,
		IdleConnTimeout:       originKeep,
		ExpectContinueTimeout: continueWait,
	}
	f.proxy.Transport = f.transport
}

// closeIdle closes the conns to origins, those that are in use as soon as they are not.
func (f *forwarding) closeIdle() {
	if f.transport != nil {
		f.transport.CloseIdleConnections()
	}
}

// endIfTaken ends the service of a conn that the handler has taken from net/http and is done with.
func (f *forwarding) endIfTaken() {
	if f.conn.taken.Load() {
		f.end()
	}
}

func (f *forwarding) authorize(r *http.Request) (user string, err error) {
	// Request reads Authorization only; the form is the same.
	basic := http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	name, password, shown := basic.BasicAuth()
	return f.http.authorize(name, password, shown)
}

// httpOrigin returns the origin that serves u. An error is a [*connect.RequestError].
func httpOrigin(u *url.URL) (proxy.Addr, error) {
	bad := func(code int, text string) error { return &connect.RequestError{Code: code, Text: text} }
	switch {
	case u.Scheme == "" && u.Host == "":
		return proxy.Addr{}, bad(400, "this is an HTTP proxy and no web server: name it as the proxy of a program, "+
			"as in curl -x http://HOST:PORT http://example.com/")
	case u.Scheme == "https":
		return proxy.Addr{}, bad(501, "https:// URLs are not fetched on behalf of a client: use CONNECT")
	case u.Scheme != "http":
		return proxy.Addr{}, bad(501, "only http:// URLs are forwarded")
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	host, n, err := connect.ParseTarget(net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return proxy.Addr{}, bad(400, "the URL's host or port is none")
	}
	return proxy.TCP(host, n), nil
}

// connect ends the service of plain requests: the client's conn is to be a tunnel.
func (f *forwarding) connect(w http.ResponseWriter, r *http.Request) {
	host, port, err := connect.ParseTarget(r.RequestURI)
	if err == nil && r.ContentLength != 0 {
		err = &connect.RequestError{Code: 400, Text: "CONNECT has no content"}
	}
	if err != nil {
		answer, _ := connect.RefusalOf(err)
		refuse(w, r, answer)
		return
	}
	if _, _, err := (&httpWriter{w, f}).Hijack(); err != nil {
		panic(http.ErrAbortHandler)
	}
	f.tunnel = &tunnel{client: f.client, rest: f.conn.head, dst: proxy.TCP(host, port)}
}

// forwardedBy are headers that httputil takes for those of a gateway, to be removed or rewritten. A
// proxy of the client's choice passes on what the client says.
var forwardedBy = []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

// rewrite makes a request to the origin of one to the proxy. The hop-by-hop headers (RFC 9110 section 7.6.1)
// are removed by now. The target goes on byte for byte as the client wrote it, where it can.
func rewrite(p *httputil.ProxyRequest) {
	for _, name := range forwardedBy {
		if v, ok := p.In.Header[name]; ok && !listed(p.In.Header["Connection"], name) {
			p.Out.Header[name] = v
		}
	}
	p.Out.Trailer = p.In.Trailer // its values come behind the content
	u := p.Out.URL
	u.User = nil
	u.RawQuery, u.ForceQuery = p.In.URL.RawQuery, p.In.URL.ForceQuery
	_, rest, _ := strings.Cut(p.In.RequestURI, "://")
	slash := strings.IndexAny(rest, "/?")
	path := ""
	if slash >= 0 {
		path, _, _ = strings.Cut(rest[slash:], "?")
	}
	switch {
	case path == "" && slash < 0 && p.In.Method == http.MethodOptions:
		u.Opaque = "*" // RFC 9112 section 3.2.4
	case path != "" && !strings.HasPrefix(path, "//"): // which Opaque would take for a host
		u.Opaque = path
	}
}

// listed says whether a Connection header names name.
func listed(connection []string, name string) bool {
	for _, line := range connection {
		for token := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(token), name) {
				return true
			}
		}
	}
	return false
}

// dial opens a conn to an origin, as a session of the handler.
func (f *forwarding) dial(ctx context.Context, addr, user string) (net.Conn, error) {
	host, digits, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return nil, err
	}
	session, cancel := context.WithCancel(f.ctx)
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		cancel()
		return nil, net.ErrClosed
	}
	f.origins.Add(1)
	flow := f.client.flow(proxy.TCP(host, uint16(port)), user)
	f.mu.Unlock()

	stop := context.AfterFunc(ctx, cancel) // ctx is that of the dial; the session outlives it
	p := &originPending{f: f, release: cancel, answer: make(chan originAnswer, 1)}
	go p.handle(session, flow)
	a := <-p.answer
	if a.err != nil {
		stop()
		return nil, &originError{flow.Dst, a.err}
	}
	if !stop() {
		a.conn.Close()
		return nil, context.Cause(ctx)
	}
	return a.conn, nil
}

// originPending is a conn to an origin that is being dialled.
type originPending struct {
	f       *forwarding
	release context.CancelFunc
	answer  chan originAnswer
}

type originAnswer struct {
	conn net.Conn
	err  error
}

func (p *originPending) handle(ctx context.Context, flow proxy.Flow) {
	p.f.handler.HandleStream(ctx, flow, p)
}

// Accept gives one end of a new stream away, and the other to net/http.
func (p *originPending) Accept() (net.Conn, []byte, error) {
	near, far := newStream()
	p.answer <- originAnswer{conn: &originConn{stream: near, client: p.f.conn}}
	return far, nil, nil
}

// Reject fails the dial.
func (p *originPending) Reject(err error) {
	if err == nil {
		err = net.ErrClosed
	}
	p.answer <- originAnswer{err: err}
}

// Done ends the session with the origin, which takes no slot of the listener.
func (p *originPending) Done() {
	p.release()
	p.f.origins.Done()
}

// originError is why an origin could not be connected to, as against what went wrong with it later.
type originError struct {
	dst proxy.Addr
	err error
}

func (e *originError) Error() string { return fmt.Sprintf("connecting to %v: %v", e.dst, e.err) }
func (e *originError) Unwrap() error { return e.err }

// failed answers a request that has got no answer of its origin.
func (f *forwarding) failed(w http.ResponseWriter, r *http.Request, err error) {
	if f.conn.broken.Load() || r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // nobody to be answered
	}
	if e, ok := errors.AsType[*originError](err); ok {
		refuse(w, r, refusal(e.err, e.dst))
		return
	}
	f.client.l.s.log.Info("request failed", "client", f.client.peer, "url", r.URL.Host, "err", err)
	answer := connect.Refusal{Code: 502, Error: "http_protocol_error",
		Text: fmt.Sprintf("sluice: %s answered with something that is no HTTP, or closed instead.", r.URL.Host)}
	if proxy.ReasonOf(err) == proxy.Reset {
		answer.Error = "connection_terminated"
		answer.Text = fmt.Sprintf("sluice: %s broke the connection before it had answered.", r.URL.Host)
	}
	refuse(w, r, answer)
}

// refuse writes an answer of the proxy's own. It ends the conn of a client that may not come in, or that has announced content, which
// it may never send.
func refuse(w http.ResponseWriter, r *http.Request, answer connect.Refusal) {
	h := w.Header()
	if answer.Code == http.StatusProxyAuthRequired {
		h.Set("Proxy-Authenticate", connect.Challenge)
	}
	if answer.Code == http.StatusProxyAuthRequired || r.ContentLength != 0 {
		h.Set("Connection", "close")
	}
	if s := answer.ProxyStatus(); s != "" {
		h.Set("Proxy-Status", s)
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	text := answer.Text + "\n"
	h.Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(answer.Code)
	io.WriteString(w, text)
	http.NewResponseController(w).Flush() // before what is left of the request
}

// abortIfTorn ends the client's conn with a reset when the answer to it could not be completed. A
// close would do where the answer has a length or chunks, but one that is delimited by the end of the
// conn (HTTP/1.0) would look complete.
func (f *forwarding) abortIfTorn(w http.ResponseWriter) {
	e := recover()
	if e == nil {
		return
	}
	if !f.conn.broken.Swap(true) { // so that its Close is a reset
		http.NewResponseController(w).Flush()
		drain(f.client.bare)
	}
	f.conn.spent.Store(true) // net/http would wait for the rest of the content
	f.conn.SetReadDeadline(time.Now())
	panic(e) // for net/http to close the conn
}

// copyBuffers is the pool of the buffers that contents are copied through.
type copyBuffers struct{}

var copyBufferPool = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// Get returns a buffer.
func (copyBuffers) Get() []byte { return copyBufferPool.Get().(*[32 << 10]byte)[:] }

// Put takes it back.
func (copyBuffers) Put(b []byte) { copyBufferPool.Put((*[32 << 10]byte)(b)) }
