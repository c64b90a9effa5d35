// Command bench measures sluice beside other relays, in one run on one machine.
//
//	go run ./bench                   # everything: about half an hour
//	go run ./bench -quick            # a glance, under two minutes
//	go run ./bench -peers direct,haproxy,sluice -tests pp64,short -rounds 5 -json out.json
//
// # What is measured
//
// A client and an origin, each a process of its own, talk through one relay at a time over loopback:
//
//	up1 up8 down1 down8 both1 both8   bulk over 1 or 8 connections: Gbit/s received, both ways added up
//	pp64                              64 connections, each with one 64-byte message under way: messages/s
//	pp1                               one such connection: the median and 99th percentile of the round trip
//	short                             connect, one request, one reply, close; 32 at a time: connections/s
//	idle                              -idle relays that answered once and then wait: memory and descriptors
//	scale                             only by -tests scale: -scale idle relays over several processes, see below
//	transparent                       only by -tests transparent: TUN, redirect and TPROXY, see below
//
// direct is the same load without a relay: what the machine can do at most, not a competitor. iocopy,
// pooled and closeboth are the three usual ways to write a relay in Go: two io.Copy with half-close (the
// standard library splices); a copy through pooled 32 KiB buffers; a copy through 16 KiB buffers that
// closes both conns when either side ends, and so loses the reply to a half-closed request. sluice-lib
// is Relay.Start behind the same accept loop as these; sluice is the program, as `sluice forward`.
//
// HAProxy stands there three times: with option splice-auto, as its manual suggests; with splicing
// always on, since the automatic choice often stays with copying here (strace shows it); and with pipes
// of 1 MiB on top. The "best" column of the ratios compares with whichever other relay does best in that
// row, and names it.
//
// Every relay may use all cores, as each does when nobody tells it otherwise: HAProxy starts a thread a
// core, nginx is told worker_processes auto as Debian does, Go uses GOMAXPROCS. Use -threads 1 to hold
// all of them to one. The programs run with the configuration printed by -config, otherwise as shipped.
//
// # Many idle relays
//
//	go run ./bench -tests scale -peers sluice,nginx,haproxy -rounds 1                # 50 000, in six processes
//	go run ./bench -tests scale -peers sluice,nginx,haproxy -rounds 1 -scale 9500    # in one
//
// The processes of a relay share one port by SO_REUSEPORT, each with an origin of its own; the clients have addresses of their own,
// so that ports suffice. The relays are opened 32 at a time, and "to open" is from connect to the first answer. They are left alone for
// three times -time, and watched for 25 times -time; then every one of them has to answer, 32 at a time, and 1 000 of them
// one at a time. Softirq time is that of the whole machine. Kernel memory is the growth of Slab in /proc/meminfo and of the TCP queues in
// /proc/net/sockstat, divided by the relays held: four sockets each, because both ends are on this machine. The projection to a
// million is arithmetic with these figures, no more.
//
// # Transparent ways in
//
//	go run ./bench -tests transparent          # under four minutes, as root
//	go run ./bench -tests transparent -quick   # under one
//	go run ./bench -tests lan-up1,lan-down1 -peers kernel,redirect,tun -rounds 5 -time 1s
//
// Each measurement makes three network namespaces: a client on a LAN, its router, and an origin behind a
// default route of the router. Two veths at MTU 1500 join them, with the offloads that they have by
// themselves. sluice runs on the router, and connects directly. Tests whose names begin with lan- have the
// client in its own namespace; with host-, it is a program on the router.
//
//	up1 up8 down1 down8   bulk, as above
//	pp1 short             as above
//	udp                   datagrams of 1400 bytes one way, 500 Mbit/s offered: what arrives, and CPU
//	idle                  -idle flows from the LAN, in the first round only
//
// kernel is the limit: the router's kernel forwards, or the client connects. forward is sluice forward, which
// the client knows of; redirect and tproxy are these commands with --setup; tun is sluice tun with its
// defaults. Only connections that the origin sees from another address than the client's own are measured as
// relayed. The table of goals says what sluice is to reach, and what it has.
//
// A sender of datagrams that was held up for more than 3 ms does not make up for it, so that on a busy
// machine less is offered. What the kernel knows of losses stands under the tables: those in the socket
// buffers of relay and origin, and in the queue of a TUN device; the others are in the relay's own queues.
//
// # How to read the table
//
// Absolute figures say little: they move by a third with where the kernel puts the processes, and
// client, relay and origin share the cores. So compare within one run, and look at the ratios first. For
// each test the relays take turns (A B C, A B C, …), and a ratio is the median, over the rounds, of the
// quotient within a round. The figures in the tables are medians over the rounds; -json keeps every
// sample and the spread.
//
// Relay CPU is that of all processes of the relay (workers, forked children, both ends of the SSH
// connection) over the measured window, user and system time, from their CPU clocks and, for children
// that are gone, from /proc/PID/stat. Softirq work that the kernel does in the context of another
// process is not in it. "÷ ends" is relay CPU divided by the CPU of client and origin in the same
// window. It cancels the speed of the machine: 0.5 means that the relay costs half of what it costs to
// make and to take the bytes. A relay can show many Gbit/s and still be expensive, where cores are left
// over; on a busy machine the CPU is the figure that matters.
//
// In bulk tests a ratio above 1 is better, as with messages/s and connections/s; in CPU, time, memory
// and descriptors a ratio below 1 is better. The ratio table marks the direction with ↑ and ↓.
//
// RSS and PSS are those of all processes of the relay, after minus before, divided by the relays held.
// RSS counts a page once for each process that has it, PSS shares it out: read PSS for socat, which
// forks, and either one for the others. "After a burst" is measured again once every one of these relays
// has moved 256 KiB there and back and is idle again. What the kernel holds for sockets and pipes is not
// in RSS; the pipes are listed by number instead, each of them up to 1 MiB of kernel memory when full.
// "Held" is below -idle where a relay ran out of descriptors or failed to answer.
//
// "Others" under the tables is the share of the machine that processes outside the benchmark took while
// it measured. Above a few percent, repeat the run before you believe a difference.
//
// # Fairness
//
// As root, everything runs in network, process and mount namespaces made for the run, with Reno as
// congestion control: BBR, where it is the default, paces loopback, and a relay would be judged by its
// pacing. Without root the run uses the machine's own loopback and says so. A relay that is not
// installed, does not start, or hangs, is named with the reason. Nothing is ever passed or failed by
// time.
package main
