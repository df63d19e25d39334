// SPDX-License-Identifier: Apache-2.0
/*
 * The driver for VT-d in QEMU's q35 machine, in legacy mode (VT-d specification, chapters 3.4, 6.5,
 * 9 and 11), with one device, one domain and a second-stage table of three levels.
 *
 * The IOVAs are divided into windows of 2 MiB with a leaf table each. Each source of requests has a
 * window, and uses it from its start for each request, so that the same IOVA leads to another page
 * with every request. Permanent mappings, such as those of the rings, have their own window. The
 * IOVAs are far above the guest's RAM.
 */
#include "../machine.h"

enum {
    // QEMU's address (Q35_HOST_BRIDGE_IOMMU_ADDR), which is also in ACPI's DMAR table.
    REGISTERS = 0xfed90000,
    VERSION = 0x00,
    GLOBAL_COMMAND = 0x18,
    GLOBAL_STATUS = 0x1c,
    ROOT_TABLE = 0x20,
    QUEUE_HEAD = 0x80,
    QUEUE_TAIL = 0x88,
    QUEUE_ADDRESS = 0x90,

    PRESENT = 1,          // root and context entries
    READ_WRITE = 3,       // second-stage entries
    WITH_DEVICE_TLB = 1 << 2,
    THREE_LEVELS = 1,     // 39 bits of IOVA
    DOMAIN = 1,

    // Types and granularities of the queue's entries.
    CONTEXT_CACHE_GLOBALLY = 1 | 1 << 4,
    IOTLB_GLOBALLY = 2 | 1 << 4,
    IOTLB_BY_PAGE = 2 | 3 << 4,
    DEVICE_TLB = 3,

    QUEUE_ENTRIES = PAGE_BYTES / 16,
    TABLE_ENTRIES = 512,
    WINDOW_BYTES = TABLE_ENTRIES * PAGE_BYTES,
    WINDOW_ORDER = 9,     // log2 of its pages
};

static const uint32_t TRANSLATION_ENABLE = 1u << 31;
static const uint32_t SET_ROOT_TABLE = 1u << 30;
static const uint32_t QUEUE_ENABLE = 1u << 26;
static const uint32_t ONE_SHOT = 0x69000000;  // commands that are not state (section 11.4.4)
static const uint64_t FIRST_IOVA = 64ull << 30;

static struct window {
    volatile uint64_t *leaf;
    unsigned used;  // pages
} windows[IOMMU_WINDOWS];

static bool active;
static uint32_t source_id;  // of the device: bus, device and function
static volatile uint64_t (*queue)[2];
static unsigned queue_tail;

static volatile uint32_t *register32(unsigned offset) {
    return (volatile uint32_t *)(uint64_t)(REGISTERS + offset);
}

static volatile uint64_t *register64(unsigned offset) {
    return (volatile uint64_t *)(uint64_t)(REGISTERS + offset);
}

static void command(uint32_t bit) {
    *register32(GLOBAL_COMMAND) = (*register32(GLOBAL_STATUS) & ~ONE_SHOT) | bit;
    while (!(*register32(GLOBAL_STATUS) & bit))
        ;
}

static void invalidate(uint64_t low, uint64_t high) {
    queue[queue_tail][0] = low;
    queue[queue_tail][1] = high;
    queue_tail = (queue_tail + 1) % QUEUE_ENTRIES;
    *register64(QUEUE_TAIL) = queue_tail * sizeof *queue;
    while (*register64(QUEUE_HEAD) != *register64(QUEUE_TAIL))
        ;
}

static volatile uint64_t *new_table(void) {
    return allocate_aligned(PAGE_BYTES, PAGE_BYTES);
}

void iommu_open(const struct pci_device *device) {
    if (!*register32(VERSION) || *register32(VERSION) == UINT32_MAX)
        give_up("the disk is behind an IOMMU, but the machine has no VT-d at its usual address");
    volatile uint64_t *top = new_table(), *middle = new_table();
    top[FIRST_IOVA >> 30] = (uint64_t)middle | READ_WRITE;
    for (unsigned number = 0; number < IOMMU_WINDOWS; number++) {
        windows[number].leaf = new_table();
        middle[number] = (uint64_t)windows[number].leaf | READ_WRITE;
    }
    source_id = device->id;
    volatile uint64_t *root = new_table(), *context = new_table();
    unsigned bus = source_id >> 8, on_bus = source_id & 0xff;
    root[2 * bus] = (uint64_t)context | PRESENT;
    context[2 * on_bus + 1] = DOMAIN << 8 | THREE_LEVELS;
    context[2 * on_bus] = (uint64_t)top | WITH_DEVICE_TLB | PRESENT;

    queue = (void *)new_table();
    *register64(ROOT_TABLE) = (uint64_t)root;
    command(SET_ROOT_TABLE);
    *register64(QUEUE_TAIL) = 0;
    *register64(QUEUE_ADDRESS) = (uint64_t)queue;
    command(QUEUE_ENABLE);
    invalidate(CONTEXT_CACHE_GLOBALLY, 0);
    invalidate(IOTLB_GLOBALLY, 0);
    command(TRANSLATION_ENABLE);
    active = true;
}

uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes) {
    if (!active)
        return address;
    struct window *range = &windows[window];
    uint64_t offset = address % PAGE_BYTES, pages = (offset + bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    if (range->used + pages > TABLE_ENTRIES)
        give_up("a request needs more IOVAs than its window has");
    uint64_t start = FIRST_IOVA + window * (uint64_t)WINDOW_BYTES;
    uint64_t iova = start + range->used * PAGE_BYTES + offset;
    for (uint64_t page = 0; page < pages; page++)
        range->leaf[range->used++] = (address - offset + page * PAGE_BYTES) | READ_WRITE;
    return iova;
}

void iommu_unmap(unsigned window) {
    struct window *range = &windows[window];
    if (!active || !range->used)
        return;
    while (range->used)
        range->leaf[--range->used] = 0;
    uint64_t start = FIRST_IOVA + window * (uint64_t)WINDOW_BYTES;
    invalidate(IOTLB_BY_PAGE | DOMAIN << 16, start | WINDOW_ORDER);
    // The lowest zero bit of the page number encodes the size (section 6.5.2.5).
    uint64_t sized = start | (WINDOW_BYTES / 2 - PAGE_BYTES) | 1;
    invalidate(DEVICE_TLB | (uint64_t)source_id << 32, sized);
}
