// SPDX-License-Identifier: Apache-2.0
/*
 * The IOVAs of the fake VFIO device behind a vIOMMU, in page tables of three levels.
 *
 * Block n of memory is at the IOVA FIRST + n * IOVA_BLOCK_BYTES, and its pages are in reverse order.
 * So no IOVA is a guest-physical address of this machine, neighbours in one space are not neighbours
 * in the other, and dmaproof can compute one from the other (qmp_tools/passthrough/proof_device.py).
 *
 * The tables are complete before the vIOMMU reads them, so nothing has to be invalidated later.
 */
#include "iova.h"

enum {
    GIB = 1 << 30,
    LEAF_BYTES = 2 << 20,
    LEAVES = GIB / LEAF_BYTES,
    REVERSE = IOVA_BLOCK_BYTES - PAGE_BYTES,
};

static const uint64_t FIRST = 64ull * GIB;

static volatile uint64_t *leaves[LEAVES];
static bool active;

static volatile uint64_t *new_table(void) {
    return allocate_aligned(PAGE_BYTES, PAGE_BYTES);
}

void iova_map(const volatile void *memory, uint64_t bytes) {
    uint64_t start = (uint64_t)memory;
    active = true;
    if (start % IOVA_BLOCK_BYTES || bytes % IOVA_BLOCK_BYTES || start + bytes > GIB)
        give_up("behind a vIOMMU, the windows must be whole MiB, and below 1 GiB");
    for (uint64_t address = start; address < start + bytes; address += PAGE_BYTES) {
        uint64_t offset = iova_of((void *)address) - FIRST;
        volatile uint64_t **leaf = &leaves[offset / LEAF_BYTES];
        if (!*leaf)
            *leaf = new_table();
        (*leaf)[offset % LEAF_BYTES / PAGE_BYTES] = address | iommu_page_flags;
    }
}

void iova_start(const struct pci_device *device) {
    volatile uint64_t *top = new_table(), *middle = new_table();
    top[FIRST / GIB] = (uint64_t)middle | iommu_table_flags;
    for (unsigned leaf = 0; leaf < LEAVES; leaf++)
        if (leaves[leaf])
            middle[leaf] = (uint64_t)leaves[leaf] | iommu_table_flags;
    iommu_start(device, top);
}

uint64_t iova_of(const volatile void *byte) {
    return active ? FIRST + ((uint64_t)byte ^ REVERSE) : (uint64_t)byte;
}

uint64_t iova_of_blocks(const volatile void *memory) {
    return active ? FIRST + (uint64_t)memory : (uint64_t)memory;
}

uint64_t iova_page(uint64_t page) {
    return active ? page ^ REVERSE / PAGE_BYTES : page;
}
