// SPDX-License-Identifier: Apache-2.0
/*
 * Memory. All memory is mapped to itself, so a pointer is a guest-physical address. The guest's own
 * memory is allocated upwards from the end of its image. The buffer is in the remaining memory, in
 * chunks spread evenly over all RAM, below and above 4 GiB. LATER_BYTES remain for allocations after
 * the buffer has been laid out.
 */
#include "machine.h"

enum {
    MAX_REGIONS = 32,
    CHUNK_BYTES = 2 << 20,
    CHUNK_PAGES = CHUNK_BYTES / PAGE_BYTES,
    LATER_BYTES = 2 << 20,
};

// A prime, so that its multiples take every value modulo any smaller number.
static const uint64_t SCATTER = 2654435761;

extern uint8_t __executable_start[], _end[];  // the linker's symbols for the image

// Free RAM; the first region is the one after the image.
static struct range regions[MAX_REGIONS];
static unsigned region_count;
static uint64_t *chunks;
static struct range expected;

void find_memory(const void *start_info) {
    struct range range;
    uint64_t image_end = (uint64_t)_end;
    region_count = 1;  // the first entry is reserved for the image's own region
    for (unsigned index = 0; ram_range(start_info, index, &range); index++) {
        if (range.end <= image_end)
            continue;
        if (range.start <= image_end)
            regions[0] = (struct range){image_end, range.end};
        else if (region_count < MAX_REGIONS)
            regions[region_count++] = range;
    }
    if (!regions[0].end)
        give_up("the memory map does not contain the guest's own image");
    for (unsigned index = 0; index < region_count; index++)
        map_ram(regions[index]);
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

struct range own_memory(void) {
    return (struct range){(uint64_t)__executable_start, regions[0].start};
}

static uint64_t first_chunk(const struct range *region) {
    return (region->start + CHUNK_BYTES - 1) / CHUNK_BYTES;
}

static uint64_t chunks_of(const struct range *region) {
    uint64_t first = first_chunk(region), end = region->end / CHUNK_BYTES;
    return first < end ? end - first : 0;
}

static uint64_t address_of_chunk(uint64_t number) {
    const struct range *region = regions;
    for (; number >= chunks_of(region); region++)
        number -= chunks_of(region);
    return (first_chunk(region) + number) * CHUNK_BYTES;
}

void lay_out_buffer(uint64_t pages) {
    uint64_t needed = (pages + CHUNK_PAGES - 1) / CHUNK_PAGES, available = 0;
    chunks = allocate(needed * sizeof *chunks);
    // What the guest allocates from now on, such as the rings of a driver that is loaded again.
    struct range later = {regions[0].start, regions[0].start + LATER_BYTES};
    regions[0].start = later.end < regions[0].end ? later.end : regions[0].end;
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
    regions[0] = later;
}

void expect_memory(struct range range) {
    expected = range;
}

uint64_t move_to_new_memory(uint64_t first, uint64_t count) {
    struct range plugged = expected;
    expected = (struct range){0};
    if (!plugged.end && !plugged_range(&plugged))
        return 0;
    map_ram(plugged);
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
