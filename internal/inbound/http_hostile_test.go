package inbound

import (
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestHTTPRefusalOfContentThatNeverComes checks that a client hears no although it has not sent the content that it has announced,
// and that it cannot stay for as long as it does not send it.
func TestHTTPRefusalOfContentThatNeverComes(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		users      Users
	}{
		{"no password", "HTTP/1.1 407 ", Users{"me": "secret"}},
		{"refused", "HTTP/1.1 502 ", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, _ := startHTTP(t, &HTTP{Users: tt.users}, hosts{"refused.test": syscall.ECONNREFUSED})
			for _, content := range []string{"Content-Length: 10", "Transfer-Encoding: chunked"} {
				c := dialAddr(t, addr)
				c.SetDeadline(time.Now().Add(5 * time.Second))
				fmt.Fprintf(c, "POST http://refused.test/ HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", content)
				if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), tt.want) {
					t.Errorf("%s: got %q, %v", content, got, err)
				}
			}
		})
	}
}

// TestHTTPUnauthorizedEndsConn checks that who has no password does not stay.
func TestHTTPUnauthorizedEndsConn(t *testing.T) {
	addr, _ := startHTTP(t, &HTTP{Users: Users{"me": "secret"}}, hosts(nil))
	c := dialAddr(t, addr)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(c, "GET http://a.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 407 ") {
		t.Errorf("got %q, %v", got, err)
	}
}
