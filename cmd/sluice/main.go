// Command sluice relays TCP traffic: it forwards ports and serves SOCKS5 and HTTP proxies, directly
// or through a chain of other proxies, so that neither end can tell it from a direct connection.
//
// Each command fills a [config.Config] from its flags, or reads one from a file; everything from
// there on is the same. Exit codes: 0, 1 failed, 2 used wrongly.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.LookupEnv))
}
