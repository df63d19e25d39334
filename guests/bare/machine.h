// SPDX-License-Identifier: Apache-2.0
/* The PC of the freestanding guest: ports, PCI, memory and the disk; a section for each .c file. */
#ifndef DMAPROOF_MACHINE_H
#define DMAPROOF_MACHINE_H

#include "../workload.h"

// Ports (Intel SDM, IN and OUT) ------------------------------------------------------------------

static inline void out8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void out32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint32_t in32(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

// exceptions.c -----------------------------------------------------------------------------------

void catch_exceptions(void);

// console.c: the serial port to dmaproof, and the timer ------------------------------------------

_Noreturn void stop(void);
// Report the reason, and stop.
_Noreturn void give_up(const char *why);
// Execute the commands that have arrived from dmaproof.
void listen(void);
void start_clock(void);
// The time since the first call; call it at least every 50 ms, or it loses time.
uint64_t microseconds(void);

// memory.c: RAM as the PVH start info describes it, mapped to itself -----------------------------

void find_memory(const void *start_info);
const char *command_line(const void *start_info);
// Make `bytes` at `address` accessible. At the start, only the first 4 GiB are mapped.
void map(uint64_t address, uint64_t bytes);
void *allocate_aligned(size_t bytes, size_t alignment);
// Spread the buffer's pages over all RAM that was not allocated.
void lay_out_buffer(uint64_t pages);

// pci.c: find and enable a device ----------------------------------------------------------------

struct pci_device {
    uint32_t address;  // of its configuration space, in the format of port 0xcf8
};

enum { PCI_ANY = 0xffff };

bool pci_find(uint16_t vendor, const uint16_t *ids, unsigned count, struct pci_device *device);
uint8_t pci_read8(const struct pci_device *device, unsigned offset);
uint32_t pci_read32(const struct pci_device *device, unsigned offset);
// The offset of the next capability `id` after the one at `after` (0: the first one), or 0.
unsigned pci_capability(const struct pci_device *device, uint8_t id, unsigned after);
// Map a memory BAR, after assigning an address if it has none.
volatile uint8_t *pci_map_bar(const struct pci_device *device, unsigned bar);
// Let the device answer memory accesses and do DMA.
void pci_enable(const struct pci_device *device);

// iommu.c: the mappings of a device behind an IOMMU ----------------------------------------------

// A window for each slot's requests, and one for permanent mappings.
enum { IOMMU_PERMANENT = MAX_WORKERS, IOMMU_WINDOWS };

// From now on, let the device access only mapped memory.
void iommu_open(const struct pci_device *device);
// Map memory and return its IOVA; without an IOMMU, return `address`.
uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes);
// Remove all mappings of a window, and wait until the device has dropped them.
void iommu_unmap(unsigned window);

// virtio_blk.c: the disk -------------------------------------------------------------------------

// Find the first virtio disk, and set up its queues for `slots` requests at a time. Return its size
// in sectors.
uint64_t disk_open(unsigned slots);
void disk_submit(unsigned slot, const struct request *request);
// Return a slot whose request is finished, or -1; `status` is virtio's, 0 for success.
int disk_poll(uint8_t *status);

#endif
