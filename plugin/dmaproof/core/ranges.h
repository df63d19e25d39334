// SPDX-License-Identifier: Apache-2.0
/* Setting millions of IOVA ranges in a bitmap at a time. */
#ifndef DMAPROOF_RANGES_H
#define DMAPROOF_RANGES_H

#include "bitmap.h"

// Ranges of bytes to set in a bitmap over the bytes [first, last] with pages of 1 << shift bytes.
struct ranges {
    const uint64_t *iovas, *lengths;  // `lengths` NULL: all ranges have `length`
    uint64_t length;
    size_t count;
    uint64_t first, last;
    unsigned shift;
};

// Properties of the ranges, from which the fastest loop is chosen.
struct survey {
    bool inside;   // every range is wholly inside, and none is empty
    bool single;   // every range touches one page
    bool near;     // most neighbours in the list lie in one cache line of the bitmap
    bool crowded;  // most neighbours in the list lie in one word of the bitmap
};

struct survey survey_ranges(const struct ranges *ranges);
// Set ranges that are all inside; return how many bits were clear before.
uint64_t set_each_range(const struct bitmap *map, const struct ranges *ranges,
                        struct survey survey, bool shared);

#endif
