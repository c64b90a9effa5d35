package lab

import (
	"context"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// The relays. Each is written by us, in as few lines as show the idea; none is anybody's code.

// Copy one way, copy the other way, and when both are done, close. Each copy waits for an end that
// only the other could bring about: nobody closes anything before.
func twoCopies(client, origin *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() { io.Copy(origin, client) })
	both.Go(func() { io.Copy(client, origin) })
	both.Wait()
	client.Close()
	origin.Close()
}

// The four lines of every tutorial: what has been copied to its end closes where it went to. That
// ends the hang, and also the answer that was on its way back.
func closePeer(client, origin *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() { io.Copy(origin, client); origin.Close() })
	both.Go(func() { io.Copy(client, origin); client.Close() })
	both.Wait()
}

// A buffer from a pool, and the copy that ends first closes both. It costs little memory, and what
// the other direction had left is gone.
func closeBothPooled(client, origin *net.TCPConn) {
	pipe := func(dst, src *net.TCPConn) {
		defer src.Close()
		defer dst.Close()
		buf := pool.Get().(*[16 << 10]byte)
		defer pool.Put(buf)
		io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf[:])
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(origin, client) })
	both.Go(func() { pipe(client, origin) })
	both.Wait()
}

var pool = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// An end of one direction is a deadline for the other, that has passed already: whoever says "that
// was all" is never answered, unless the answer was there before.
func deadlineOnEOF(client, origin *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() {
		io.Copy(origin, client)
		origin.SetReadDeadline(time.Now())
	})
	both.Go(func() {
		io.Copy(client, origin)
		client.SetReadDeadline(time.Now())
	})
	both.Wait()
	client.Close()
	origin.Close()
}

// Half-closes, and shuts the side that has ended for reading as well. That looks tidy, but nobody
// listens any more: an error that comes later on that side is not seen.
func closeReadWrite(client, origin *net.TCPConn) {
	pipe := func(dst, src *net.TCPConn) {
		_, err := io.Copy(dst, src)
		if err != nil { // an error interrupts both
			src.Close()
			dst.Close()
			return
		}
		src.CloseRead()
		dst.CloseWrite()
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(origin, client) })
	both.Go(func() { pipe(client, origin) })
	both.Wait()
	client.Close()
	origin.Close()
}

// Half-closes, and then gives the answer so much time. A minute is long for a person and short for
// a database: an answer that takes longer, or is only slow to be read, is cut off.
func halfCloseDeadline(client, origin *net.TCPConn) {
	const patience = 100 * time.Millisecond // a minute there; the lab's silences are as much shorter
	pipe := func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.CloseWrite()
		dst.SetReadDeadline(time.Now().Add(patience))
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(origin, client) })
	both.Go(func() { pipe(client, origin) })
	both.Wait()
	client.Close()
	origin.Close()
}

// Whichever direction is done first ends it all, and a panic is turned into a line of the log.
// There is a hexdump for debugging, and with it a loop in place of io.Copy.
func eitherDone(client, origin *net.TCPConn) {
	done := make(chan struct{}, 2)
	pipe := func(dst, src *net.TCPConn, name string) {
		defer func() {
			if r := recover(); r != nil {
				slog.Debug("panic", "in", name, "value", r)
			}
			done <- struct{}{}
		}()
		buf := make([]byte, 16<<10)
		for {
			n, err := src.Read(buf)
			if slog.Default().Enabled(context.Background(), slog.LevelDebug) {
				slog.Debug(hex.Dump(buf[:n]))
			}
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	go pipe(origin, client, "up")
	go pipe(client, origin, "down")
	<-done
	client.Close()
	origin.Close()
}

// The SSH port forward of a well-known article: the remote is dialled once, before the loop that
// accepts. The first client works. The second one talks into the first one's connection.
func sharedRemote() func(client, origin *net.TCPConn) {
	var once sync.Once
	var remote *net.TCPConn
	return func(client, origin *net.TCPConn) {
		once.Do(func() { remote = origin })
		if origin != remote {
			defer origin.Close() // it was never dialled
		}
		done := make(chan struct{}, 2)
		go func() { io.Copy(client, remote); done <- struct{}{} }()
		go func() { io.Copy(remote, client); done <- struct{}{} }()
		<-done
		client.Close()
		remote.Close()
	}
}

// Half-close what has ended, and close both when both have: what the careful relays do. All bytes
// and all clean ends arrive. An error is taken for an end, so that nobody ever sees a reset, and an error
// on a side that is not read at the time is not seen at all.
func halfClose(client, origin *net.TCPConn) {
	pipe := func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.CloseWrite()
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(origin, client) })
	both.Go(func() { pipe(client, origin) })
	both.Wait()
	client.Close()
	origin.Close()
}

// Ours. Ends are passed on as ends and resets as resets, what was read before is passed on first, and
// both sides are watched also when nobody reads from them: docs/relaying.md says how.
func sluice(client, origin *net.TCPConn) {
	relay.Join(context.Background(), client, origin)
}
