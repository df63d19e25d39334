// SPDX-License-Identifier: Apache-2.0
/* The PC below the freestanding guest: ports, PCI, memory, the disk; a part for each .c file. */
#ifndef DMAPROOF_MACHINE_H
#define DMAPROOF_MACHINE_H

#include "../workload.h"

// Ports (Intel SDM, IN and OUT) --------------------------------------------------------------------

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

// console.c: the serial port to the tool, and the timer ------------------------------------------

_Noreturn void stop(void);
// Tell why, and stop.
_Noreturn void give_up(const char *why);
// Serve the tool's commands that have come in.
void listen(void);
void start_clock(void);
// Since the first call; it must be called at least every 50 ms, or loses time.
uint64_t microseconds(void);

// memory.c: RAM as the PVH start info describes it, mapped to itself -------------------------------

void find_memory(const void *start_info);
const char *command_line(const void *start_info);
// Make `bytes` at `address` accessible: what lies beyond 4 GiB is not from the start.
void map(uint64_t address, uint64_t bytes);
void *allocate_aligned(size_t bytes, size_t alignment);
// Spread the buffer's pages over all of RAM that was not allocated.
void lay_out_buffer(uint64_t pages);

// pci.c: a device, found and made ready ----------------------------------------------------------

struct pci_device {
    uint32_t address;  // of its configuration space, as port 0xcf8 takes it
};

enum { PCI_ANY = 0xffff };

bool pci_find(uint16_t vendor, const uint16_t *ids, unsigned count, struct pci_device *device);
uint8_t pci_read8(const struct pci_device *device, unsigned offset);
uint32_t pci_read32(const struct pci_device *device, unsigned offset);
// The offset of the capability `id` behind the one at `after` (0: of the first), or 0.
unsigned pci_capability(const struct pci_device *device, uint8_t id, unsigned after);
// Where a memory BAR is, given an address if it has none; and let the device answer and do DMA.
volatile uint8_t *pci_map_bar(const struct pci_device *device, unsigned bar);
void pci_enable(const struct pci_device *device);

// iommu.c: what a device's addresses lead to, if it is behind an IOMMU ------------------------------

// A window for each slot's requests, and one for what stays mapped.
enum { IOMMU_KEPT = MAX_WORKERS, IOMMU_WINDOWS };

// Let the device reach nothing but what is mapped from now on.
void iommu_open(const struct pci_device *device);
// What the device is to be told in the place of `address`: that itself, if it has no IOMMU.
uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes);
// Take away all that was mapped in a window, and wait until the device has it no more.
void iommu_unmap(unsigned window);

// virtio_blk.c: the disk -------------------------------------------------------------------------

// Find the first virtio disk, and give `slots` requests at a time a place in its queues. Returns
// its size in sectors.
uint64_t disk_open(unsigned slots);
void disk_submit(unsigned slot, const struct request *request);
// A slot whose request is over, or -1; `status` is virtio's, 0 for success.
int disk_poll(uint8_t *status);

#endif
