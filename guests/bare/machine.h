// SPDX-License-Identifier: Apache-2.0
/*
 * The machine of the freestanding guest, with a section for each .c file. The first part is common;
 * the second part is what each architecture implements in its own folder.
 */
#ifndef DMAPROOF_MACHINE_H
#define DMAPROOF_MACHINE_H

#include "../workload.h"

struct range {
    uint64_t start, end;
};

// A function of a PCI device.
struct pci_device {
    uint16_t id;  // bus, device and function
};

// console.c: the line to dmaproof ----------------------------------------------------------------

// Report the reason, and stop.
_Noreturn void give_up(const char *why);
// Execute the commands that have arrived from dmaproof.
void listen(void);

// memory.c: RAM, mapped to itself ----------------------------------------------------------------

void find_memory(const void *start_info);
void *allocate_aligned(size_t bytes, size_t alignment);
// The image and all memory that was allocated.
struct range own_memory(void);
// Use this memory as plugged memory, although no register of the machine names it.
void expect_memory(struct range range);
// Spread the buffer's pages over all RAM that was not allocated.
void lay_out_buffer(uint64_t pages);

// pci.c: find and enable a device ----------------------------------------------------------------

// Find the first device with this vendor and one of `ids`, from `device` on.
bool pci_find(uint16_t vendor, const uint16_t *ids, unsigned count, struct pci_device *device);
uint8_t pci_read8(const struct pci_device *device, unsigned offset);
// The offset of the next capability `id` after the one at `after` (0: the first one), or 0.
unsigned pci_capability(const struct pci_device *device, uint8_t id, unsigned after);
// Map a memory BAR, after assigning an address if it has none. pci_enable must follow.
volatile uint8_t *pci_map_bar(const struct pci_device *device, unsigned bar);
// Let the device answer memory accesses and do DMA.
void pci_enable(const struct pci_device *device);

// iommu.c: the mappings of a device behind an IOMMU ----------------------------------------------

// A window for each slot's requests, and one for permanent mappings.
enum {
    IOMMU_PERMANENT = MAX_WORKERS,
    IOMMU_WINDOWS,
    IOMMU_WINDOW_ORDER = 9,
    IOMMU_WINDOW_PAGES = 1 << IOMMU_WINDOW_ORDER,
};

// From now on, let the device access only mapped memory.
void iommu_open(const struct pci_device *device);
// Map memory and return its IOVA; without an IOMMU, return `address`.
uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes);
// Remove all mappings of a window, and wait until the device has dropped them.
void iommu_unmap(unsigned window);

// storage.c: the device that carries out the workload's requests ----------------------------------

// Find the first such device, and set up its queues for `slots` requests at a time. Return its size
// in sectors. If the device is in use already, it is reset, and no request is in flight afterwards.
uint64_t storage_open(unsigned slots);
// Reset the device and set up the same queues again. No request is in flight afterwards.
void storage_reset(void);
// Submit a request, which must remain in place until it is finished.
void storage_submit(unsigned slot, struct request *request);
// Return a slot whose request is finished, or -1; `status` is 0 for success.
int storage_poll(uint8_t *status);
// Report what the device's driver counts, if anything.
void storage_report(void);

// What an architecture implements ================================================================

// boot.c: what the boot protocol hands over ------------------------------------------------------

// Find range number `index` of RAM. Return false if there are not so many.
bool ram_range(const void *start_info, unsigned index, struct range *range);
const char *command_line(const void *start_info);

// exceptions.c -----------------------------------------------------------------------------------

void catch_exceptions(void);

// paging.c: memory is mapped to itself. At the start, the image and what is below it are mapped --

void map_ram(struct range range);
void map_registers(struct range range);

// memory_hotplug.c -------------------------------------------------------------------------------

// Find plugged memory that was not found before, which is not mapped yet.
bool plugged_range(struct range *range);

// serial.c: the serial port to dmaproof, polled --------------------------------------------------

void send_byte(char byte);
bool receive_byte(char *byte);

// clock.c ----------------------------------------------------------------------------------------

void start_clock(void);
// The time since the first call; call it at least every 50 ms, or it loses time.
uint64_t microseconds(void);
_Noreturn void stop(void);
// reset_machine() of workload.h is here, too.

// pci_configuration.c ----------------------------------------------------------------------------

uint32_t pci_read32(const struct pci_device *device, unsigned offset);
void pci_write32(const struct pci_device *device, unsigned offset, uint32_t value);
// The end of the addresses that are free for BARs without an address.
uint32_t pci_free_end(void);

// The driver of the IOMMU -------------------------------------------------------------------------

// What is added to the address of a table, and of a page, in an entry of the page tables.
extern const uint64_t iommu_table_flags, iommu_page_flags;
// Translate the device's accesses by a table of three levels with 512 entries each.
void iommu_start(const struct pci_device *device, const volatile uint64_t *table);
// Wait until the IOMMU and the device have dropped the mappings of the window that begins at `iova`.
void iommu_invalidate(uint64_t iova);

#endif
