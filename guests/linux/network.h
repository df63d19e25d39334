// SPDX-License-Identifier: Apache-2.0
#ifndef DMAPROOF_NETWORK_H
#define DMAPROOF_NETWORK_H

#include <stdbool.h>

// Bring up the network interface `name`, and keep it busy in a thread. Return false on a failure,
// with the reason in errno.
bool start_network(const char *name);
// Report the number of received packets, if the network was started.
void report_network(void);

#endif
