// SPDX-License-Identifier: Apache-2.0
#ifndef DMAPROOF_NETWORK_H
#define DMAPROOF_NETWORK_H

#include <stdbool.h>

// Bring the network device `name` up, and keep it busy in a thread. False if it cannot be done;
// errno says why.
bool start_network(const char *name);
// Tell how many packets have come, if there is a network.
void tell_network(void);

#endif
