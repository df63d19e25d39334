// SPDX-License-Identifier: Apache-2.0
/*
 * The driver for an SMMUv3 (Arm IHI 0070, chapters 3 to 6), with one stream, one context descriptor
 * and a stage 1 table with a granule of 4 KiB. The event queue stays off.
 */
#include "../machine.h"
#include "device_tree.h"

enum {
    CAPABILITIES = 0x00,
    CAPABILITY_ATS = 1 << 10,
    SIZES = 0x14,
    OUTPUT_SIZE_MASK = 7,
    CONTROL = 0x20,
    CONTROL_SMMU = 1 << 0,
    CONTROL_COMMAND_QUEUE = 1 << 3,
    CONTROL_DONE = 0x24,
    STREAM_TABLE = 0x80,
    STREAM_TABLE_FORMAT = 0x88,  // linear, and log2 of its entries
    QUEUE = 0x90,                // with log2 of its entries
    QUEUE_PRODUCER = 0x98,
    QUEUE_CONSUMER = 0x9c,
    QUEUE_ERROR_MASK = 0x7f << 24,

    ENTRY_WORDS = 8,  // of a stream table entry, and of a context descriptor
    STREAM_VALID = 1,
    STREAM_STAGE_1 = 5 << 1,
    STREAM_ATS_SHIFT = 28,
    COMMAND_WORDS = 2,
    QUEUE_ORDER = 8,
    QUEUE_ENTRIES = 1 << QUEUE_ORDER,
    STREAMS_OF_BUS_ORDER = 8,
    DOMAIN = 1,  // the address space identifier, ASID

    CONFIGURATION_OF_STREAM = 0x03,
    TLB_EVERYTHING = 0x10,
    TLB_BY_ADDRESS = 0x12,
    DEVICE_TLB = 0x40,
    SYNC = 0x46,
    LEAF = 1,
    GRANULE_4K = 1 << 10,
};

// A context descriptor's first word (section 5.4): 39 bits of IOVA, walks through write-back caches
// that are inner shareable, nothing behind TTB1, valid; 64-bit tables, faults are recorded and abort.
static const uint64_t CONTEXT = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1ull << 31 |
                                1ull << 41 | 1ull << 45 | 1ull << 46;
enum { CONTEXT_OUTPUT_SIZE_SHIFT = 32, CONTEXT_DOMAIN_SHIFT = 48 };
static const uint64_t WRITE_BACK = 0xff;  // memory type 0

const uint64_t iommu_table_flags = 3;
// A valid page of memory type 0 (Arm ARM, section D8.3.1.2): unprivileged reads and writes, inner
// shareable, accessed, not global.
const uint64_t iommu_page_flags = 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11;

static uint64_t registers;
static uint64_t stream;  // the device's bus, device and function
static bool has_ats;
static volatile uint64_t (*queue)[COMMAND_WORDS];
static uint32_t produced;  // commands, modulo two rounds of the queue

static volatile uint32_t *register32(unsigned offset) {
    return (volatile uint32_t *)(registers + offset);
}

static volatile uint64_t *register64(unsigned offset) {
    return (volatile uint64_t *)(registers + offset);
}

static void command(uint64_t low, uint64_t high) {
    queue[produced % QUEUE_ENTRIES][0] = low;
    queue[produced % QUEUE_ENTRIES][1] = high;
    produced = (produced + 1) % (2 * QUEUE_ENTRIES);
}

// Have the commands executed, and wait until their effects are visible.
static void synchronize(void) {
    command(SYNC, 0);
    __asm__ volatile("dsb sy" : : : "memory");  // the tables and the queue precede the register
    *register32(QUEUE_PRODUCER) = produced;
    for (uint32_t consumed = produced + 1; consumed != produced;) {
        consumed = *register32(QUEUE_CONSUMER);
        if (consumed & QUEUE_ERROR_MASK)
            give_up("the SMMUv3 has refused a command");
    }
}

static void enable(uint32_t parts) {
    *register32(CONTROL) = parts;
    while (*register32(CONTROL_DONE) != parts)
        ;
}

void iommu_start(const struct pci_device *device, const volatile uint64_t *table) {
    struct property place = device_tree_property("smmuv3@", 0, "reg");
    if (!place.value)
        give_up("the disk is behind an IOMMU, but the device tree has no SMMUv3");
    registers = device_tree_number(place, 0, 2);
    map_registers((struct range){registers, registers + device_tree_number(place, 2, 2)});
    has_ats = *register32(CAPABILITIES) & CAPABILITY_ATS;
    stream = device->id;

    size_t context_bytes = ENTRY_WORDS * sizeof(uint64_t);
    volatile uint64_t *context = allocate_aligned(context_bytes, context_bytes);
    uint64_t output_size = *register32(SIZES) & OUTPUT_SIZE_MASK;
    context[0] = CONTEXT | output_size << CONTEXT_OUTPUT_SIZE_SHIFT |
                 (uint64_t)DOMAIN << CONTEXT_DOMAIN_SHIFT;
    context[1] = (uint64_t)table;
    context[3] = WRITE_BACK;

    unsigned order = STREAMS_OF_BUS_ORDER;
    while (stream >> order)
        order++;
    size_t streams_bytes = context_bytes << order;
    volatile uint64_t(*streams)[ENTRY_WORDS] = allocate_aligned(streams_bytes, streams_bytes);
    streams[stream][1] = (uint64_t)has_ats << STREAM_ATS_SHIFT;
    streams[stream][0] = (uint64_t)context | STREAM_STAGE_1 | STREAM_VALID;

    queue = allocate_aligned(QUEUE_ENTRIES * sizeof *queue, QUEUE_ENTRIES * sizeof *queue);
    *register64(STREAM_TABLE) = (uint64_t)streams;
    *register32(STREAM_TABLE_FORMAT) = order;
    *register64(QUEUE) = (uint64_t)queue | QUEUE_ORDER;
    *register32(QUEUE_PRODUCER) = 0;
    *register32(QUEUE_CONSUMER) = 0;
    enable(CONTROL_COMMAND_QUEUE);
    command(CONFIGURATION_OF_STREAM | stream << 32, LEAF);
    command(TLB_EVERYTHING, 0);
    synchronize();
    enable(CONTROL_COMMAND_QUEUE | CONTROL_SMMU);
}

void iommu_invalidate(uint64_t iova) {
    // The range is (NUM + 1) << SCALE pages (section 4.4.1.1).
    uint64_t num = 31, scale = IOMMU_WINDOW_ORDER - 5;
    command(TLB_BY_ADDRESS | num << 12 | scale << 20 | (uint64_t)DOMAIN << 48,
            iova | GRANULE_4K | LEAF);
    synchronize();
    if (has_ats) {  // only after the SMMU itself has dropped the mappings (section 3.9.1)
        command(DEVICE_TLB | stream << 32, iova | IOMMU_WINDOW_ORDER);
        synchronize();
    }
}
