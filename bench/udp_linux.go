package main

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// The load of datagrams: what a video call of many, or a QUIC download, sends.
const (
	datagram     = 1400    // bytes of payload
	datagramRate = 500e6   // bits of payload a second
	datagramTurn = 128     // sent in a row at most: a sender that was held up does not make up for it
	datagramRoom = 8 << 20 // of the ends' socket buffers, so that it is not they who lose any
)

// startDatagrams makes sure of the way there and back, and starts to send.
func (c *client) startDatagrams() error {
	conn, err := net.Dial("udp", c.Addr)
	if err != nil {
		return err
	}
	u := conn.(*net.UDPConn)
	if err := force(u, unix.SO_SNDBUFFORCE); err != nil {
		return err
	}
	buf := make([]byte, 1)
	for range 30 {
		if _, err = u.Write([]byte{opProbe}); err != nil {
			continue
		}
		u.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err = u.Read(buf); err == nil {
			go c.sendDatagrams(u)
			return nil
		}
	}
	return fmt.Errorf("no datagram comes back: %w", err)
}

// sendDatagrams sends at the rate until it is stopped.
func (c *client) sendDatagrams(conn *net.UDPConn) {
	defer close(c.done)
	defer conn.Close()
	const gap = time.Duration(datagram * 8 / datagramRate * 1e9)
	buf := make([]byte, datagram)
	for next := time.Now(); !c.stopped.Load(); {
		due := int(time.Since(next)/gap) + 1
		if due > datagramTurn {
			due, next = datagramTurn, time.Now()
		} else {
			next = next.Add(time.Duration(due) * gap)
		}
		for range due {
			if _, err := conn.Write(buf); err != nil {
				c.fail(err)
				continue
			}
			c.n.Add(1)
		}
		time.Sleep(min(time.Until(next), time.Millisecond))
	}
}

// sinkDatagrams counts datagrams, and answers probes.
func (o *origin) sinkDatagrams(conn *net.UDPConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // what an earlier answer has met
		case n == 1:
			conn.WriteToUDPAddrPort(buf[:1], from)
		default:
			o.received.Add(1)
		}
	}
}

func listenDatagrams(addr string) (*net.UDPConn, error) {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return nil, err
	}
	u := pc.(*net.UDPConn)
	return u, force(u, unix.SO_RCVBUFFORCE)
}

// force sets the size of a buffer beyond what the machine allows everyone.
func force(u *net.UDPConn, option int) error {
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, datagramRoom) })
	return errors.Join(cerr, err)
}
