// SPDX-License-Identifier: Apache-2.0
/* The addresses at which the device sees the guest's memory. */
#ifndef DMAPROOF_IOVA_H
#define DMAPROOF_IOVA_H

#include "../../bare/machine.h"

// Memory is mapped in blocks of this size, whose pages are in reverse order.
enum { IOVA_BLOCK_BYTES = 1 << 20 };

// Let the vIOMMU translate the device's accesses, so that IOVAs differ from guest-physical
// addresses. Call iova_map for all memory first.
void iova_start(const struct pci_device *device);
// Map whole blocks of memory.
void iova_map(const volatile void *memory, uint64_t bytes);
// The IOVA of a byte of mapped memory.
uint64_t iova_of(const volatile void *byte);
// The IOVA at which mapped blocks begin.
uint64_t iova_of_blocks(const volatile void *memory);
// The number of the page of some blocks that the device sees as page number `page`.
uint64_t iova_page(uint64_t page);

#endif
