// SPDX-License-Identifier: Apache-2.0
/* Ranges of IOVAs, millions of them at a time, set in a bitmap. */
#ifndef DMAPROOF_RANGES_H
#define DMAPROOF_RANGES_H

#include "bitmap.h"

// Ranges of bytes, to be set in a bitmap over the bytes [first, last] with pages of 1 << shift.
struct ranges {
    const uint64_t *iovas, *lengths;  // no lengths: all have `length`
    uint64_t length;
    size_t count;
    uint64_t first, last;
    unsigned shift;
};

// What was found out about them, so that the fastest loop can be taken.
struct survey {
    bool inside;   // every range is wholly inside, and none empty
    bool single;   // every range touches one page
    bool near;     // most neighbours in the list lie in one cache line of the bitmap
    bool crowded;  // … in one word
};

struct survey survey_ranges(const struct ranges *ranges);
// Set ranges that are all inside; returns how many bits were not set before.
uint64_t set_each_range(const struct bitmap *map, const struct ranges *ranges,
                        struct survey survey, bool shared);

#endif
