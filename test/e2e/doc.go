// Package e2e holds the program to its word: its tests build sluice once, with the race detector,
// start it on loopback addresses and put real programs on both of its sides: curl, netcat and
// openssl as clients; HAProxy, nginx, python's http.server and openssl as origins; danted,
// microsocks and a second sluice as upstream proxies.
//
// Each server gets a random address of 127.0.0.0/8 to itself, so that tests can run at the same
// time and no port can be taken. At the end of every test its sluice must have no more descriptors
// open than at its beginning, must end at once when asked to, and must not have seen a data race.
package e2e
