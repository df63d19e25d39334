// SPDX-License-Identifier: Apache-2.0
#include "merge.h"

#include "runs.h"

#include <stdlib.h>

// Return 64 bits from bit `shift` (0 to 63) of `words` on; read the second word only if needed.
INLINE uint64_t load_shifted(const uint64_t *words, unsigned shift) {
    if (shift == 0)
        return load(words);
    return load(words) >> shift | load(words + 1) << (64 - shift);
}

enum { BLOCK_WORDS = 8 };

// OR whole words. Blocks without a set bit are only read; most blocks have none.
INLINE uint64_t merge_block(uint64_t *to, const uint64_t *from, unsigned shift, unsigned words,
                            bool shared) {
    uint64_t added = 0;
    if (!any_set(from, words + (shift != 0)))
        return 0;
    UNROLLED
    for (unsigned i = 0; i < words; i++) {
        uint64_t fresh = load_shifted(from + i, shift) & ~load(to + i);
        if (shared)
            fresh = fresh ? or_word(to + i, fresh, true) : 0;
        else
            to[i] |= fresh;
        added += (uint64_t)__builtin_popcountll(fresh);
    }
    return added;
}

INLINE uint64_t merge_shifted(uint64_t *to, const uint64_t *from, unsigned shift, uint64_t count,
                              bool shared) {
    uint64_t added = 0, i = 0;
    for (; i + BLOCK_WORDS <= count; i += BLOCK_WORDS)
        added += merge_block(to + i, from + i, shift, BLOCK_WORDS, shared);
    return added + merge_block(to + i, from + i, shift, (unsigned)(count - i), shared);
}

VECTORISED static uint64_t merge_words(uint64_t *to, const uint64_t *from, unsigned shift,
                                       uint64_t count, bool shared) {
    if (shift)
        return merge_shifted(to, from, shift, count, shared);
    return shared ? merge_shifted(to, from, 0, count, true)
                  : merge_shifted(to, from, 0, count, false);
}

// Return how many words from bit `bit` on can be read from words that lie wholly inside.
INLINE uint64_t readable_words(const struct bitmap *map, uint64_t bit) {
    if (!is_whole(map, bit / 64))
        return 0;
    return map->first_whole + map->whole - bit / 64 - (bit % 64 != 0);
}

uint64_t merge(const struct bitmap *into, uint64_t into_bit, const struct bitmap *from,
               uint64_t from_bit, uint64_t count, bool shared) {
    uint64_t added = 0;
    struct cursor at = cursor_at(into, into_bit, count);
    while (next_word(&at)) {
        uint64_t source = from_bit + from->skew + (count - at.count), value = 0;
        uint64_t words = whole_words(into, &at), readable = readable_words(from, source);
        if (words && readable) {
            words = words < readable ? words : readable;
            added += merge_words(into->base + at.index, from->base + source / 64, source % 64,
                                 words, shared);
            skip_words(&at, words);
            continue;
        }
        struct cursor part = {.bit = source, .count = at.bits};
        for (unsigned done = 0; next_word(&part); done += part.bits)
            value |= read_at(from, part.index, part.mask, false) >> part.bit % 64 << done;
        if (value)
            added += (uint64_t)__builtin_popcountll(
                or_at(into, at.index, value << at.bit % 64, shared));
    }
    return added;
}

// Runs are found piece by piece, so that their memory stays small even if the bitmap is full.
enum { PIECE_BITS = 1 << 20 };

bool merge_pages(const struct page_bitmap *into, const struct page_bitmap *from, uint64_t iova,
                 uint64_t last, bool shared, uint64_t *added) {
    struct runs runs = {0};
    uint64_t bit = (iova >> from->shift) - from->first_page;
    uint64_t end = (last >> from->shift) - from->first_page + 1;
    for (uint64_t count; bit < end && !runs.failed; bit += count) {
        count = end - bit < PIECE_BITS ? end - bit : PIECE_BITS;
        runs.count = 0;
        find_runs(&runs, &from->map, bit, count, false);
        for (size_t i = 0; i < runs.count; i++) {
            uint64_t page = from->first_page + bit + runs.pairs[2 * i];
            uint64_t start = page << from->shift;
            uint64_t stop = ((page + runs.pairs[2 * i + 1]) << from->shift) - 1;  // may wrap
            uint64_t low = (start > iova ? start : iova) >> into->shift;
            uint64_t high = (stop < last ? stop : last) >> into->shift;
            *added += set_run(&into->map, low - into->first_page, high - low + 1, shared);
        }
    }
    free(runs.pairs);
    return !runs.failed;
}
