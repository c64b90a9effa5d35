package sockopt

import "golang.org/x/sys/unix"

const reusePort = unix.SO_REUSEPORT_LB // SO_REUSEPORT gives all clients to one socket
