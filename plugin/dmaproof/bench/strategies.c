// SPDX-License-Identifier: Apache-2.0
/*
 * The strategies of carrying reported ranges into a bitmap that were discussed when the kernel got
 * its iova_bitmap, written from their descriptions so that they can be compared with dmaproof's.
 *
 * Each strategy takes the same reports (page numbers relative to the bitmap's start, and lengths in
 * pages) and sets the same bits in the same user's bitmap. The strategies differ in how they get
 * access to the bitmap's memory. A kernel has to *pin* pages of user memory before it can write to
 * them. Here a pin only notes the page's address, so the times are lower bounds for a kernel. The
 * pages that a kernel would pin, and the bytes moved besides the bits, are counted.
 *
 *   copied    a private bitmap of the driver over the whole range takes the bits, and is then
 *   merged
 *             into the user's bitmap as a whole. Nothing is pinned for long, every byte is moved.
 *   pieces    the range is walked in windows of 512 bitmap pages; each window is pinned, and the
 *             hardware is queried for its piece of the range (first merged version, Linux 6.1).
 *   on demand the hardware is queried once; a report outside the pinned window moves the window to
 *             the report, and the last window stays (Linux 6.11).
 *
 * strategies.py compiles this file when a benchmark runs, and calls `carry`.
 */
#define _POSIX_C_SOURCE 200809L  // clock_gettime
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE_SHIFT = 12, BITMAP_PAGE = 4096, PAGE_BITS = BITMAP_PAGE * 8, WORD_BITS = 64, WINDOW_PAGES = 512 };

// The same as _Cost in strategies.py.
struct cost {
    double seconds, fixed;  // `fixed`: the part that depends only on the bitmap's size
    uint64_t pins, bytes;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// The user's bitmap, and the run of its pages that is pinned now.
struct window {
    uint8_t *bitmap;
    uint64_t pages;  // in the whole bitmap
    uint64_t first;  // of the window
    unsigned count;
    uint8_t *pinned[WINDOW_PAGES];
    struct cost *cost;
};

__attribute__((noinline)) static void pin(struct window *window, uint64_t page) {
    uint64_t left = window->pages - page;
    window->first = page;
    window->count = left < WINDOW_PAGES ? (unsigned)left : WINDOW_PAGES;
    for (unsigned i = 0; i < window->count; i++)
        window->pinned[i] = window->bitmap + (page + i) * BITMAP_PAGE;
    window->cost->pins += window->count;
}

// Set bits [first, first + count) of one page's bitmap, without atomics, as the kernel does.
static inline void set_in_page(uint8_t *page, unsigned first, unsigned count) {
    uint64_t *words = (uint64_t *)page + first / WORD_BITS;
    unsigned offset = first % WORD_BITS;
    if (offset + count <= WORD_BITS) {
        *words |= (~UINT64_C(0) >> (WORD_BITS - count)) << offset;
        return;
    }
    *words++ |= ~UINT64_C(0) << offset;
    count -= WORD_BITS - offset;
    for (; count >= WORD_BITS; count -= WORD_BITS)
        *words++ = ~UINT64_C(0);
    if (count)
        *words |= ~UINT64_C(0) >> (WORD_BITS - count);
}

static inline void set_run(uint8_t *bitmap, uint64_t bit, uint64_t count) {
    while (count) {
        unsigned offset = bit % PAGE_BITS, room = PAGE_BITS - offset;
        unsigned part = count < room ? (unsigned)count : room;
        set_in_page(bitmap + bit / PAGE_BITS * BITMAP_PAGE, offset, part);
        bit += part;
        count -= part;
    }
}

/*
 * On demand: every piece of a report that lies outside the window moves the window to that piece. A
 * report is a function call that is not inlined, because a driver calls too.
 */
__attribute__((noinline)) static void report(struct window *window, uint64_t iova,
                                             uint64_t length) {
    uint64_t bit = iova >> PAGE_SHIFT, last = (iova + length - 1) >> PAGE_SHIFT;
    do {
        uint64_t page = bit / PAGE_BITS;
        if (__builtin_expect(page - window->first >= window->count, 0))
            pin(window, page);
        uint64_t left = last - bit + 1;
        unsigned offset = bit % PAGE_BITS, room = PAGE_BITS - offset;
        unsigned part = left < room ? (unsigned)left : room;
        set_in_page(window->pinned[page - window->first], offset, part);
        bit += part;
    } while (bit <= last);
}

static void on_demand(struct window *window, const uint64_t *bits, const uint64_t *counts,
                      size_t reports) {
    for (size_t i = 0; i < reports; i++)
        report(window, bits[i] << PAGE_SHIFT, counts[i] << PAGE_SHIFT);
}

/*
 * Piece by piece: for each window the hardware reports the pages in its piece of the range. `bits`
 * are sorted, so the cost of finding these pages is not measured.
 */
static void in_pieces(struct window *window, const uint64_t *bits, const uint64_t *counts,
                      size_t reports) {
    const uint64_t piece = (uint64_t)WINDOW_PAGES * PAGE_BITS;
    size_t next = 0;
    for (uint64_t page = 0; page < window->pages; page += WINDOW_PAGES) {
        uint64_t start = page * PAGE_BITS, end = start + piece;
        pin(window, page);
        for (; next < reports && bits[next] < end; next++) {
            uint64_t low = bits[next] > start ? bits[next] : start;
            uint64_t high = bits[next] + counts[next];
            set_run(window->bitmap, low, (high < end ? high : end) - low);
            if (high > end)
                break;  // the rest of the report belongs to the next piece
        }
    }
}

static bool copied(struct window *window, const uint64_t *bits, const uint64_t *counts,
                   size_t reports) {
    double began = now();
    size_t size = window->pages * BITMAP_PAGE;
    uint8_t *own = aligned_alloc(BITMAP_PAGE, size);
    if (!own)
        return false;
    memset(own, 0, size);
    double cleared = now();
    for (size_t i = 0; i < reports; i++)
        set_run(own, bits[i], counts[i]);
    double set = now();
    for (size_t i = 0; i < size / 8; i++)
        ((uint64_t *)window->bitmap)[i] |= ((const uint64_t *)own)[i];
    free(own);
    window->cost->fixed = cleared - began + now() - set;
    window->cost->pins += window->pages;
    window->cost->bytes += 2 * (uint64_t)size;  // cleared, then merged
    return true;
}

enum strategy { COPIED, IN_PIECES, ON_DEMAND };
enum outcome { DONE, UNFIT, NO_MEMORY };

// Carry `reports` runs of bits into a bitmap of whole pages, aligned to 8 bytes. UNFIT: a run is
// empty, not wholly inside, or (in pieces) begins before the end of the last one; no bit was set.
enum outcome carry(enum strategy strategy, uint8_t *bitmap, uint64_t bitmap_bytes,
                   const uint64_t *bits, const uint64_t *counts, uint64_t reports,
                   struct cost *cost) {
    *cost = (struct cost){0};
    struct window window = {
        .bitmap = bitmap, .pages = bitmap_bytes / BITMAP_PAGE, .cost = cost};
    uint64_t room = window.pages * PAGE_BITS;
    for (uint64_t i = 0; i < reports; i++) {
        if (!counts[i] || bits[i] >= room || counts[i] > room - bits[i])
            return UNFIT;
        if (strategy == IN_PIECES && i && bits[i] < bits[i - 1] + counts[i - 1])
            return UNFIT;
    }
    bool done = true;
    double began = now();
    if (strategy == COPIED)
        done = copied(&window, bits, counts, reports);
    else if (strategy == IN_PIECES)
        in_pieces(&window, bits, counts, reports);
    else
        on_demand(&window, bits, counts, reports);
    cost->seconds = now() - began;
    return done ? DONE : NO_MEMORY;
}
