// Package conform holds sluice as a whole, its inbounds, engine and outbounds in one process, to what
// the relay alone keeps: that neither end can tell it from a direct connection.
//
// Its tests play the scenarios of relay/relaytest through each inbound, over TCP and Unix sockets,
// through chains of two sluices, a TLS hop and streams in memory; and what happens before there is
// anything to relay: refusals with their reasons, early bytes, and clients that leave while their
// destination is being dialled.
package conform
