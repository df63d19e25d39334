// SPDX-License-Identifier: Apache-2.0
/*
 * Threads that set, take and read the bits of one bitmap at the same time, for the thread
 * sanitizer. The sanitizer reports each word that a thread accesses without an atomic operation.
 * The bitmap has ragged ends, and another thread writes the bytes before and after it, in the same
 * words, without atomics. Exit code 0: the sanitizer found no race, and no bit was lost.
 */
#include "../plugin/dmaproof/core/merge.h"
#include "../plugin/dmaproof/core/ranges.h"
#include "../plugin/dmaproof/core/runs.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { WRITERS = 3, ROUNDS = 30, START = 3, BYTES = 2003, BITS = BYTES * 8, PAGES = 256 };
enum { FEW_BITS = 27 * 8, END = START + BYTES, ALIGNED = WRITERS * 64 - START * 8 };

static _Alignas(8) uint8_t memory[START + BYTES + 8];
// Only one thread uses these bitmaps, while another thread writes in their first or last word.
static _Alignas(8) uint8_t few[32], many[5000];
static atomic_uint running = WRITERS;

static struct bitmap shared_bitmap(void) {
    return bitmap_of(memory + START, BYTES);
}

// Set every third page from the first page on, and back from the last page, of a bitmap with one
// ragged end. Whole words have a faster loop, which must not access the word at the ragged end.
static void set_at_ends(uint8_t *start, size_t bytes, uint64_t first, unsigned shift) {
    struct bitmap map = bitmap_of(start, bytes);
    uint64_t iovas[2 * PAGES], pages = bytes * 8;
    for (uint64_t i = 0; i < PAGES; i++) {
        iovas[2 * i] = first + ((i * WRITERS % pages) << shift);
        iovas[2 * i + 1] = first + ((pages - 1 - i * WRITERS % pages) << shift);
    }
    struct ranges ranges = {iovas, NULL, 1, 2 * PAGES, first, first + ((pages - 1) << shift),
                            shift};
    set_each_range(&map, &ranges, survey_ranges(&ranges), true);
}

// Each writer has every third bit, and sets its bits with every function of the core.
static void *set_all(void *number) {
    uint64_t mine = (uint64_t)(uintptr_t)number;
    struct bitmap map = shared_bitmap(), whole = bitmap_of(memory + 8, BYTES / 8 * 8 - 8);
    // In the terms of ranges.c: crowded, near, and neither.
    static const uint64_t steps[] = {WRITERS, WRITERS * 30, WRITERS * 347};
    uint64_t iovas[PAGES];
    _Alignas(8) uint8_t own[BYTES] = {0};
    struct bitmap from = bitmap_of(own, BYTES);
    for (uint64_t bit = mine; bit < BITS; bit += WRITERS)
        set_run(&from, bit, 1, false);
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (uint64_t bit = mine; bit < BITS; bit += WRITERS)
            set_run(&map, bit, 1, true);
        for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
            for (uint64_t page = 0; page < PAGES; page++)
                iovas[page] = (mine + page * steps[i]) % (BITS / WRITERS * WRITERS);
            struct ranges ranges = {iovas, NULL, 1, PAGES, 0, BITS - 1, 0};
            set_each_range(&map, &ranges, survey_ranges(&ranges), true);
            // The same in whole words, which have their own loops.
            for (uint64_t page = 0; page < PAGES; page++)
                iovas[page] %= whole.whole * 64;
            ranges.last = whole.whole * 64 - 1;
            set_each_range(&whole, &ranges, survey_ranges(&ranges), true);
        }
        set_at_ends(memory + START, END / 8 * 8 - START, 0, 0);
        set_at_ends(memory + 8, END - 8, 0, 0);
        // One whole word and a ragged one, with pages so large or IOVAs so high that sums overflow.
        uint8_t *last_words = memory + END / 8 * 8 - 8;
        set_at_ends(last_words, 8 + END % 8, 0, 57);
        set_at_ends(last_words, 8 + END % 8, (UINT64_C(1) << 63) - 40, 0);
        merge(&map, 0, &from, 0, BITS, true);
        merge(&map, 3, &from, 0, BITS - 3, true);
        merge(&map, ALIGNED, &from, 0, BITS - ALIGNED, true);  // without a shift
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

// Write the bytes around the bitmaps, as their owner may without knowing the bitmaps.
static void *write_neighbours(void *unused) {
    do {  // at least once, and not only after the writers: the load orders the writes after it
        for (unsigned i = 0; i < START; i++)
            memory[i]++;
        for (unsigned i = END; i < sizeof memory; i++)
            memory[i]++;
        few[FEW_BITS / 8]++;
        many[0]++;
        sched_yield();
    } while (atomic_load(&running));
    return unused;
}

static uint64_t take(struct runs *runs, const struct bitmap *map, const struct bitmap *found) {
    runs->count = 0;
    find_runs(runs, map, 0, BITS, true);
    for (size_t i = 0; i < runs->count; i++)
        set_run(found, runs->pairs[2 * i], runs->pairs[2 * i + 1], false);
    return runs->count;
}

// Set page 0 and page `last`, the two ends of a bitmap.
static uint64_t set_ends(const struct bitmap *map, uint64_t last) {
    uint64_t iovas[] = {0, last};
    struct ranges ranges = {iovas, NULL, 1, 2, 0, last, 0};
    return set_each_range(map, &ranges, survey_ranges(&ranges), true);
}

// Read the bits that the other threads write, with every function of the core.
static uint64_t read_all(const struct bitmap *map) {
    _Alignas(8) uint8_t own[BYTES + 8] = {0};
    uint64_t added = 0;
    struct bitmap into = bitmap_of(own, BYTES);
    struct bitmap ends_ragged = bitmap_of(few, FEW_BITS / 8);
    struct bitmap begins_ragged = bitmap_of(many + 1, sizeof many - 1);
    struct page_bitmap fine = {*map, 0, 12}, coarse = {into, 0, 14};
    added += merge(&into, 0, map, 0, BITS, false) + merge(&into, 5, map, 0, BITS - 5, true);
    added += set_ends(&ends_ragged, 193) + set_ends(&begins_ragged, 8 * sizeof many - 9);
    added += merge(&into, 0, &ends_ragged, 1, FEW_BITS - 1, false);
    added += merge(&into, 0, &ends_ragged, 65, FEW_BITS - 65, false);
    added += merge(&into, 0, &begins_ragged, 0, 128, false);
    merge_pages(&coarse, &fine, 0, ((uint64_t)BITS << 12) - 1, false, &added);
    return added + count_set(map, 0, BITS) + count_set(map, 1, BITS - 9);
}

int main(void) {
    pthread_t writers[WRITERS], neighbour;
    uint8_t own[BYTES] = {0};
    struct bitmap map = shared_bitmap(), found = bitmap_of(own, BYTES);
    struct runs runs = {0};
    uint64_t seen = 0;
    for (uintptr_t i = 0; i < WRITERS; i++) {
        if (pthread_create(writers + i, NULL, set_all, (void *)i))
            return 2;
    }
    if (pthread_create(&neighbour, NULL, write_neighbours, NULL))
        return 2;
    while (atomic_load(&running))
        seen += read_all(&map) + take(&runs, &map, &found);
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(writers[i], NULL);
    pthread_join(neighbour, NULL);
    take(&runs, &map, &found);
    free(runs.pairs);
    uint64_t lost = BITS - count_set(&found, 0, BITS);
    fprintf(stderr, "%llu bits lost, %llu seen\n", (unsigned long long)lost,
            (unsigned long long)seen);
    return lost ? 1 : 0;
}
