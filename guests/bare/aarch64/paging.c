// SPDX-License-Identifier: Apache-2.0
/* The page tables (Arm ARM, section D8.3): blocks of 1 GiB, below tables of 512 GiB each. */
#include "../machine.h"

enum {
    TABLE_ENTRIES = 512,
    TABLE = 3,
};
// As in mmu.h.
static const uint64_t DEVICE_BLOCK = 0x60000000000401;
static const uint64_t NORMAL_BLOCK = 0x705;

static const uint64_t BLOCK_BYTES = 1ull << 30;
static const uint64_t ADDRESS_BITS = 0xfffffffff000;

extern volatile uint64_t page_map[];  // start.S; the first 2 GiB are mapped

static void map(struct range range, uint64_t attributes) {
    uint64_t address = range.start & -BLOCK_BYTES;
    for (; address < range.end; address += BLOCK_BYTES) {
        volatile uint64_t *entry = &page_map[address >> 39 & (TABLE_ENTRIES - 1)];
        if (!*entry)
            *entry = (uint64_t)allocate_aligned(PAGE_BYTES, PAGE_BYTES) | TABLE;
        volatile uint64_t *blocks = (void *)(*entry & ADDRESS_BITS);
        blocks[address >> 30 & (TABLE_ENTRIES - 1)] = address | attributes;
    }
    // The next access must find the new entries (section D8.16.3).
    __asm__ volatile("dsb ishst\n\tisb" : : : "memory");
}

void map_ram(struct range range) {
    map(range, NORMAL_BLOCK);
}

void map_registers(struct range range) {
    map(range, DEVICE_BLOCK);
}
