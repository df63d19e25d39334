// SPDX-License-Identifier: Apache-2.0
/* The page tables (Intel SDM, volume 3, section 4.5): pages of 2 MiB. */
#include "../machine.h"

enum {
    TABLE_ENTRIES = 512,
    PRESENT_WRITABLE = 3,
    LARGE = 0x80,
    LARGE_PAGE_BYTES = 2 << 20,
};

extern uint64_t page_map[];  // start.S; the first 4 GiB are mapped

static uint64_t *table_of(uint64_t *entry) {
    if (!*entry)
        *entry = (uint64_t)allocate_aligned(PAGE_BYTES, PAGE_BYTES) | PRESENT_WRITABLE;
    return (void *)(*entry & -(uint64_t)PAGE_BYTES);
}

void map_ram(struct range range) {
    uint64_t address = range.start & -(uint64_t)LARGE_PAGE_BYTES;
    for (; address < range.end; address += LARGE_PAGE_BYTES) {
        uint64_t *pointers = table_of(&page_map[address >> 39 & (TABLE_ENTRIES - 1)]);
        uint64_t *directory = table_of(&pointers[address >> 30 & (TABLE_ENTRIES - 1)]);
        directory[address >> 21 & (TABLE_ENTRIES - 1)] = address | PRESENT_WRITABLE | LARGE;
    }
}

void map_registers(struct range range) {
    map_ram(range);  // the MTRRs say what is not RAM
}
