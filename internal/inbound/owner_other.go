//go:build !linux

package inbound

import (
	"io/fs"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Elsewhere than on Linux we do not look for the owner of a socket.

func fchmod(uintptr, fs.FileMode) {}

func boundInode(proxy.Addr) string { return "" }

func unixInode(string) string { return "" }

func socketOwner(string, time.Time) (string, int) { return "", 0 }
