// Package transparent holds redirect and tproxy to their word, on networks of its own: a client, a router that runs sluice, and an origin,
// each in a network namespace, joined by veth pairs. Nothing in the network namespace of the machine itself is changed.
package transparent
