package netstack

import (
	"io"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// The relay borrows what a conn has received, and passes it to the kernel from where it lies.

// loan collects the memory of received bytes. It is what the endpoint writes to.
type loan struct {
	bufs [][]byte
	left int // how much more is wanted
}

// Write implements io.Writer. An error ends the endpoint's writing.
func (l *loan) Write(b []byte) (int, error) {
	l.bufs = append(l.bufs, b)
	if l.left -= len(b); l.left <= 0 {
		return len(b), io.ErrShortWrite
	}
	return len(b), nil
}

// discard takes so many bytes, and keeps none.
type discard int

// Write implements io.Writer.
func (d *discard) Write(b []byte) (int, error) {
	n := min(len(b), int(*d))
	if *d -= discard(n); n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Lend waits for bytes and returns some, at least the first of them, and not many more than most. They are valid until
// Return; an error comes without bytes.
func (c *conn) Lend(most int) ([][]byte, error) {
	c.in.mu.Lock()
	for {
		if err := c.check(&c.in); err != nil {
			c.in.mu.Unlock()
			return nil, c.opError("read", err)
		}
		if !c.holdOpen() {
			continue
		}
		clear(c.loan.bufs)
		c.loan = loan{bufs: c.loan.bufs[:0], left: most}
		_, err := c.ep.Read(&c.loan, tcpip.ReadOptions{Peek: true})
		if err == nil {
			return c.loan.bufs, nil
		}
		isDead := c.isDead()
		c.letGo()
		switch err.(type) {
		case *tcpip.ErrWouldBlock:
			c.loan.bufs = nil // who waits holds no memory
			<-c.in.ready
			continue
		case *tcpip.ErrClosedForReceive:
			if !isDead && !c.closed.Load() {
				c.in.mu.Unlock()
				return nil, io.EOF
			}
		}
		failed := c.readError(err)
		c.in.mu.Unlock()
		return nil, failed
	}
}

// Return ends a loan, of which the first n bytes are used up. A Close or Abort that came meanwhile takes effect.
func (c *conn) Return(n int) {
	for left := discard(n); left > 0; {
		if _, err := c.ep.Read(&left, tcpip.ReadOptions{}); err != nil {
			break
		}
	}
	if n > 0 {
		c.ep.ModerateRecvBuf(n)
	}
	c.letGo()
	c.in.mu.Unlock()
}

// holdOpen keeps the endpoint from being closed until letGo; false if it is closed already.
func (c *conn) holdOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lent = !c.closed.Load()
	return c.lent
}

func (c *conn) letGo() {
	c.mu.Lock()
	end := c.end
	c.lent, c.end = false, nil
	c.mu.Unlock()
	if end != nil {
		end()
	}
}
