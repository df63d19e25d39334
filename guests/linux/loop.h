// SPDX-License-Identifier: Apache-2.0
#ifndef DMAPROOF_LOOP_H
#define DMAPROOF_LOOP_H

#include <stdint.h>

#include "../workload.h"

// Bring up the network `interface`. It sends every Ethernet frame back; or, if there is an
// `echo_port`, a server at that UDP port of the gateway sends every datagram back.
void loop_start(const char *interface, const char *echo_port);
// Open a socket for one thread's transfers.
int loop_open(uintptr_t thread);
// Send the request's pages over the network and back; return the number of transferred bytes.
uint64_t loop_transfer(int fd, const struct request *request);
// Report how many messages were sent and have come back.
void report_loop(void);

#endif
