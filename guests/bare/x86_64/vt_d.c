// SPDX-License-Identifier: Apache-2.0
/*
 * The driver for VT-d in QEMU's q35 machine, in legacy mode (VT-d specification, chapters 3.4, 6.5,
 * 9 and 11), with one device, one domain and a second-stage table.
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
};

static const uint32_t TRANSLATION_ENABLE = 1u << 31;
static const uint32_t SET_ROOT_TABLE = 1u << 30;
static const uint32_t QUEUE_ENABLE = 1u << 26;
static const uint32_t ONE_SHOT = 0x69000000;  // commands that are not state (section 11.4.4)

const uint64_t iommu_table_flags = READ_WRITE;
const uint64_t iommu_page_flags = READ_WRITE;

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

void iommu_start(const struct pci_device *device, const volatile uint64_t *table) {
    if (!*register32(VERSION) || *register32(VERSION) == UINT32_MAX)
        give_up("the disk is behind an IOMMU, but the machine has no VT-d at its usual address");
    source_id = device->id;
    volatile uint64_t *root = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    volatile uint64_t *context = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    unsigned bus = source_id >> 8, on_bus = source_id & 0xff;
    root[2 * bus] = (uint64_t)context | PRESENT;
    context[2 * on_bus + 1] = DOMAIN << 8 | THREE_LEVELS;
    context[2 * on_bus] = (uint64_t)table | WITH_DEVICE_TLB | PRESENT;

    queue = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    *register64(ROOT_TABLE) = (uint64_t)root;
    command(SET_ROOT_TABLE);
    *register64(QUEUE_TAIL) = 0;
    *register64(QUEUE_ADDRESS) = (uint64_t)queue;
    command(QUEUE_ENABLE);
    invalidate(CONTEXT_CACHE_GLOBALLY, 0);
    invalidate(IOTLB_GLOBALLY, 0);
    command(TRANSLATION_ENABLE);
}

void iommu_invalidate(uint64_t iova) {
    invalidate(IOTLB_BY_PAGE | DOMAIN << 16, iova | IOMMU_WINDOW_ORDER);
    // The lowest zero bit of the page number encodes the size (section 6.5.2.5).
    uint64_t sized = iova | (IOMMU_WINDOW_PAGES / 2 - 1) * PAGE_BYTES | 1;
    invalidate(DEVICE_TLB | (uint64_t)source_id << 32, sized);
}
