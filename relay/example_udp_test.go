package relay_test

import (
	"context"
	"fmt"
	"net"

	"github.com/sluice-proxy/sluice/relay"
)

// One client's datagrams go to an origin that sees a socket of ours, and the answers come back.
func ExampleRelay_JoinPackets() {
	listen := func() *net.UDPConn {
		c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			panic(err)
		}
		return c
	}
	dial := func(to *net.UDPConn) *net.UDPConn {
		c, err := net.DialUDP("udp", nil, to.LocalAddr().(*net.UDPAddr))
		if err != nil {
			panic(err)
		}
		return c
	}
	client, origin := listen(), listen()
	near, far := dial(client), dial(origin)
	at := near.LocalAddr()

	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan relay.PacketResult)
	var stats relay.PacketStats
	go func() {
		over <- new(relay.Relay).JoinPackets(ctx, relay.NewUDPConn(near), relay.NewUDPConn(far), &stats)
	}()

	client.WriteTo([]byte("question"), at)
	b := make([]byte, 100)
	n, from, _ := origin.ReadFrom(b)
	fmt.Printf("origin got %s\n", b[:n])
	origin.WriteTo([]byte("answer"), from)
	n, _ = client.Read(b)
	fmt.Printf("client got %s\n", b[:n])

	cancel()
	fmt.Println("ended:", (<-over).End)
	client.Close()
	origin.Close()
	// Output:
	// origin got question
	// client got answer
	// ended: cancel
}
