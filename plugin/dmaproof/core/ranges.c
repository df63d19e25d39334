// SPDX-License-Identifier: Apache-2.0
#include "ranges.h"

enum { PREFETCH_AHEAD = 32 };
enum { LINE_BITS = 512 };

INLINE struct survey survey_each(const struct ranges *ranges, const uint64_t *lengths) {
    const uint64_t *iovas = ranges->iovas;
    uint64_t outside = 0, wide = 0, other_line = 0, other_word = 0, count = ranges->count;
    uint64_t first = ranges->first, room = ranges->last - first, length = ranges->length - 1;
    uint64_t in_page = (UINT64_C(1) << ranges->shift) - 1;
    // The bits in which two IOVAs of one word may differ; with huge pages, these are all bits.
    uint64_t in_word = ranges->shift < 55 ? (in_page + 1) * 64 - 1 : ~UINT64_C(0);
    uint64_t in_line = ranges->shift < 55 ? (in_page + 1) * LINE_BITS - 1 : ~UINT64_C(0);
    for (uint64_t i = 0; i + 1 < count; i++) {
        uint64_t apart = iovas[i] ^ iovas[i + 1];
        other_word += apart > in_word;
        other_line += apart > in_line;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = iovas[i] - first, end = lengths ? lengths[i] - 1 : length;
        outside |= (uint64_t)(start > room) | (uint64_t)(end > room - start) |
                   (uint64_t)(end == ~UINT64_C(0));  // empty: the check that finds it at 2^64
        wide |= ((iovas[i] & in_page) + end) & ~in_page;
    }
    return (struct survey){!outside, !wide, other_line < count / 8, other_word < count / 8};
}

VECTORISED static struct survey survey_all(const struct ranges *ranges) {
    return ranges->lengths ? survey_each(ranges, ranges->lengths) : survey_each(ranges, NULL);
}

struct survey survey_ranges(const struct ranges *ranges) {
    return survey_all(ranges);
}

INLINE uint64_t set_page(uint64_t *base, uint64_t page, bool shared) {
    uint64_t *word = base + page / 64, bit = UINT64_C(1) << page % 64, old = load(word);
    if (!shared) {
        *word = old | bit;
        return !(old & bit);
    }
    // For one bit the compiler emits a single locked instruction; for a mask, a loop.
    return old & bit ? 0 : !(atomic_fetch_or((_Atomic uint64_t *)word, bit) & bit);
}

// Set pages in whole words, in any order.
INLINE uint64_t set_pages(uint64_t *base, const uint64_t *iovas, size_t count, unsigned shift,
                          uint64_t origin, bool prefetch, bool shared) {
    uint64_t added = 0;
    size_t i = 0;
    for (; prefetch && i + PREFETCH_AHEAD < count; i++) {
        __builtin_prefetch(base + ((iovas[i + PREFETCH_AHEAD] >> shift) - origin) / 64, 1);
        added += set_page(base, (iovas[i] >> shift) - origin, shared);
    }
    for (; i < count; i++)
        added += set_page(base, (iovas[i] >> shift) - origin, shared);
    return added;
}

enum { CROWD = 8 };

// Set pages whose neighbours often share a word; such a word is written once for all of them.
INLINE uint64_t set_crowds(uint64_t *base, const uint64_t *iovas, size_t count, unsigned shift,
                           uint64_t origin, bool shared) {
    uint64_t added = 0;
    size_t i = 0;
    for (; i + CROWD <= count; i += CROWD) {
        uint64_t first = (iovas[i] >> shift) - origin, mask = 0, apart = 0;
        for (unsigned k = 0; k < CROWD; k++) {
            uint64_t page = (iovas[i + k] >> shift) - origin;
            mask |= UINT64_C(1) << page % 64;
            apart |= page ^ first;
        }
        if (LIKELY(apart < 64))
            added += (uint64_t)__builtin_popcountll(or_word(base + first / 64, mask, shared));
        else
            added += set_pages(base, iovas + i, CROWD, shift, origin, false, shared);
    }
    return added + set_pages(base, iovas + i, count - i, shift, origin, false, shared);
}

INLINE uint64_t set_each(const struct bitmap *map, const struct ranges *ranges,
                         struct survey survey, bool shared) {
    uint64_t added = 0;
    uint64_t origin = (ranges->first >> ranges->shift) - map->skew;
    uint64_t last_word = ((ranges->last >> ranges->shift) - origin) / 64;
    if (LIKELY(survey.single && is_whole(map, 0) && is_whole(map, last_word)))
        return survey.crowded ? set_crowds(map->base, ranges->iovas, ranges->count, ranges->shift,
                                           origin, shared)
             : survey.near    ? set_pages(map->base, ranges->iovas, ranges->count, ranges->shift,
                                          origin, false, shared)
                              : set_pages(map->base, ranges->iovas, ranges->count, ranges->shift,
                                          origin, true, shared);
    for (size_t i = 0; i < ranges->count; i++) {
        uint64_t iova = ranges->iovas[i];
        uint64_t end = iova + ((ranges->lengths ? ranges->lengths[i] : ranges->length) - 1);
        uint64_t first = (iova >> ranges->shift) - origin - map->skew;
        uint64_t last = (end >> ranges->shift) - origin - map->skew;
        added += set_run(map, first, last - first + 1, shared);
    }
    return added;
}

VECTORISED static uint64_t set_shared(const struct bitmap *map, const struct ranges *ranges,
                                      struct survey survey) {
    return set_each(map, ranges, survey, true);
}

VECTORISED static uint64_t set_private(const struct bitmap *map, const struct ranges *ranges,
                                       struct survey survey) {
    return set_each(map, ranges, survey, false);
}

uint64_t set_each_range(const struct bitmap *map, const struct ranges *ranges,
                        struct survey survey, bool shared) {
    return shared ? set_shared(map, ranges, survey) : set_private(map, ranges, survey);
}
