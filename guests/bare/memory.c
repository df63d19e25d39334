// SPDX-License-Identifier: Apache-2.0
/*
 * Memory. All memory is mapped to itself, so a pointer is a guest-physical address. The guest's own
 * memory is allocated upwards from the end of its image. The buffer is in the remaining memory, in
 * chunks spread evenly over all RAM, below and above 4 GiB.
 */
#include "machine.h"

enum {
    MAX_REGIONS = 32,
    CHUNK_BYTES = 2 << 20,
    CHUNK_PAGES = CHUNK_BYTES / PAGE_BYTES,
    TABLE_ENTRIES = 512,
    PRESENT_WRITABLE = 3,
    LARGE = 0x80,

    // Registers of pluggable memory, which ACPI uses too (QEMU's docs/specs/acpi_mem_hotplug).
    SLOT = 0xa00,  // write: select a slot for all registers; read: its address, in two halves
    SLOT_BYTES = 0xa08,
    SLOT_FLAGS = 0xa14,
    SLOT_ENABLED = 1,
};

// The structures of PVH boot (Xen's public/arch-x86/hvm/start_info.h).
struct start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, acpi_table, memory_map;
    uint32_t memory_map_entries, reserved;
};
struct memory_map_entry {
    uint64_t start, bytes;
    uint32_t type, reserved;
};
enum { MEMORY_MAP_RAM = 1 };

// A prime, so that its multiples take every value modulo any smaller number.
static const uint64_t SCATTER = 2654435761;

extern uint64_t page_map[], page_directory_pointers[];  // start.S; the first 4 GiB are mapped
extern uint8_t _end[];                                  // the linker's symbol for the image's end

// Free RAM; the first region is the one after the image.
static struct region {
    uint64_t start, end;
} regions[MAX_REGIONS];
static unsigned region_count;
static uint64_t *chunks;

void find_memory(const void *start_info) {
    const struct start_info *info = start_info;
    const struct memory_map_entry *entries = (void *)info->memory_map;
    uint64_t image_end = (uint64_t)_end;
    if (info->version < 1 || !info->memory_map_entries)
        give_up("the PVH start info has no memory map");
    region_count = 1;  // the first entry is reserved for the image's own region
    for (uint32_t index = 0; index < info->memory_map_entries; index++) {
        uint64_t start = entries[index].start, end = start + entries[index].bytes;
        if (entries[index].type != MEMORY_MAP_RAM || end <= image_end)
            continue;
        if (start <= image_end)
            regions[0] = (struct region){image_end, end};
        else if (region_count < MAX_REGIONS)
            regions[region_count++] = (struct region){start, end};
    }
    if (!regions[0].end)
        give_up("the memory map does not contain the guest's own image");
    for (unsigned index = 0; index < region_count; index++)
        map(regions[index].start, regions[index].end - regions[index].start);
}

const char *command_line(const void *start_info) {
    return (const char *)((const struct start_info *)start_info)->command_line;
}

void *allocate_aligned(size_t bytes, size_t alignment) {
    uint64_t start = (regions[0].start + alignment - 1) & -alignment;
    if (start + bytes > regions[0].end)
        give_up("the guest is out of memory; give it more memory");
    regions[0].start = start + bytes;
    void *memory = (void *)start;
    __builtin_memset(memory, 0, bytes);
    return memory;
}

void *allocate(size_t bytes) {
    return allocate_aligned(bytes, 64);
}

uint8_t *allocate_unmoving(size_t bytes) {
    return allocate_aligned(bytes, PAGE_BYTES);
}

static uint64_t *table_of(uint64_t *entry) {
    if (!*entry)
        *entry = (uint64_t)allocate_aligned(PAGE_BYTES, PAGE_BYTES) | PRESENT_WRITABLE;
    return (void *)(*entry & -(uint64_t)PAGE_BYTES);
}

void map(uint64_t address, uint64_t bytes) {
    uint64_t end = address + bytes;
    for (address &= -(uint64_t)CHUNK_BYTES; address < end; address += CHUNK_BYTES) {
        uint64_t *pointers = table_of(&page_map[address >> 39 & (TABLE_ENTRIES - 1)]);
        uint64_t *directory = table_of(&pointers[address >> 30 & (TABLE_ENTRIES - 1)]);
        directory[address >> 21 & (TABLE_ENTRIES - 1)] = address | PRESENT_WRITABLE | LARGE;
    }
}

static uint64_t first_chunk(const struct region *region) {
    return (region->start + CHUNK_BYTES - 1) / CHUNK_BYTES;
}

static uint64_t chunks_of(const struct region *region) {
    uint64_t first = first_chunk(region), end = region->end / CHUNK_BYTES;
    return first < end ? end - first : 0;
}

static uint64_t address_of_chunk(uint64_t number) {
    const struct region *region = regions;
    for (; number >= chunks_of(region); region++)
        number -= chunks_of(region);
    return (first_chunk(region) + number) * CHUNK_BYTES;
}

void lay_out_buffer(uint64_t pages) {
    uint64_t needed = (pages + CHUNK_PAGES - 1) / CHUNK_PAGES, available = 0;
    chunks = allocate(needed * sizeof *chunks);
    for (unsigned index = 0; index < region_count; index++)
        available += chunks_of(&regions[index]);
    if (needed > available) {
        report("fatal message=\"the workload needs %lu pages, but only %lu are free; give the "
               "guest more memory\"",
               pages, available * CHUNK_PAGES);
        stop();
    }
    for (uint64_t index = 0; index < needed; index++) {
        // Each region of the buffer must be spread over all RAM, so neighbours are far apart.
        uint64_t place = index * SCATTER % needed;
        chunks[index] = address_of_chunk(place * available / needed);
    }
}

static uint64_t read_halves(uint16_t port) {
    uint32_t low = in32(port);
    return (uint64_t)in32((uint16_t)(port + 4)) << 32 | low;
}

uint64_t move_to_new_memory(uint64_t first, uint64_t count) {
    static uint32_t slots_used;
    out32(SLOT, slots_used);
    if (!(in8(SLOT_FLAGS) & SLOT_ENABLED) || in8(SLOT_FLAGS) == UINT8_MAX)
        return 0;
    slots_used++;
    struct region plugged = {read_halves(SLOT), 0};
    plugged.end = plugged.start + read_halves(SLOT_BYTES);
    map(plugged.start, plugged.end - plugged.start);
    uint64_t chunk = (first + CHUNK_PAGES - 1) / CHUNK_PAGES, end = (first + count) / CHUNK_PAGES;
    uint64_t space = chunks_of(&plugged), moved = end > chunk ? end - chunk : 0;
    if (moved > space)
        moved = space;
    for (uint64_t index = 0; index < moved; index++)  // spread from the first to the last chunk
        chunks[chunk + index] = (first_chunk(&plugged) + index * space / moved) * CHUNK_BYTES;
    return moved * CHUNK_PAGES;
}

uint8_t *page_at(uint64_t page) {
    return (uint8_t *)(chunks[page / CHUNK_PAGES] + page % CHUNK_PAGES * PAGE_BYTES);
}

uint64_t gpa_of(const void *address) {
    return (uint64_t)address;
}
