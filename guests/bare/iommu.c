// SPDX-License-Identifier: Apache-2.0
/*
 * The mappings of one device behind an IOMMU, in page tables of three levels.
 *
 * The IOVAs are divided into windows of 2 MiB with a leaf table each. Each source of requests has a
 * window, and uses it from its start for each request, so that the same IOVA leads to another page
 * with every request. Permanent mappings, such as those of the rings, have their own window. The
 * IOVAs are far above the guest's RAM.
 */
#include "machine.h"

enum { TABLE_ENTRIES = IOMMU_WINDOW_PAGES };

static const uint64_t FIRST_IOVA = 64ull << 30;

static struct window {
    volatile uint64_t *leaf;
    unsigned used;  // pages
} windows[IOMMU_WINDOWS];

static bool active;

static uint64_t start_of(unsigned window) {
    return FIRST_IOVA + window * (uint64_t)IOMMU_WINDOW_PAGES * PAGE_BYTES;
}

static volatile uint64_t *new_table(void) {
    return allocate_aligned(PAGE_BYTES, PAGE_BYTES);
}

void iommu_open(const struct pci_device *device) {
    if (active)  // the disk's driver was loaded again, but not the IOMMU's
        return;
    volatile uint64_t *top = new_table(), *middle = new_table();
    top[FIRST_IOVA >> 30] = (uint64_t)middle | iommu_table_flags;
    for (unsigned number = 0; number < IOMMU_WINDOWS; number++) {
        windows[number].leaf = new_table();
        middle[number] = (uint64_t)windows[number].leaf | iommu_table_flags;
    }
    iommu_start(device, top);
    active = true;
}

uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes) {
    if (!active)
        return address;
    struct window *range = &windows[window];
    uint64_t offset = address % PAGE_BYTES, pages = (offset + bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    if (range->used + pages > TABLE_ENTRIES)
        give_up("a request needs more IOVAs than its window has");
    uint64_t iova = start_of(window) + range->used * PAGE_BYTES + offset;
    for (uint64_t page = 0; page < pages; page++)
        range->leaf[range->used++] = (address - offset + page * PAGE_BYTES) | iommu_page_flags;
    return iova;
}

void iommu_unmap(unsigned window) {
    struct window *range = &windows[window];
    if (!active || !range->used)
        return;
    while (range->used)
        range->leaf[--range->used] = 0;
    iommu_invalidate(start_of(window));
}
