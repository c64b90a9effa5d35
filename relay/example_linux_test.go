package relay_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/sluice-proxy/sluice/relay"
)

// While the origin is dialled nobody reads from the client. One that gives up, as by Ctrl-C, is noticed
// nonetheless, and the dial need not run into its timeout.
func ExampleResetContext() {
	client, accepted := conns()

	ctx, stop := relay.ResetContext(context.Background(), accepted)
	dial := make(chan error)
	go func() { // stands for a dial that gets no answer
		<-ctx.Done()
		dial <- context.Cause(ctx)
	}()

	client.CloseWrite() // has sent all it wants to send: it waits for its answer
	relay.Abort(client) // does not want it any more

	err := <-dial
	stop()
	fmt.Println("client was reset:", errors.Is(err, syscall.ECONNRESET))
	relay.Abort(accepted)
	// Output: client was reset: true
}
