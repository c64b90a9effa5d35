// Command static is a client that no preloaded library can reach: built without cgo, it makes its own system calls. It
// prints what it gets.
//
//	static tcp HOST:PORT    sends a line, half-closes, and reads to the end
//	static udp HOST:PORT    sends a datagram, and reads one
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(network, addr string) error {
	c, err := net.Dial(network, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte("hello\n")); err != nil {
		return err
	}
	if c, ok := c.(*net.TCPConn); ok {
		c.CloseWrite()
		_, err = io.Copy(os.Stdout, c)
		return err
	}
	b := make([]byte, 2000)
	n, err := c.Read(b)
	os.Stdout.Write(b[:n])
	return err
}
