// SPDX-License-Identifier: Apache-2.0
/* Runs of set bits: finding, taking and counting them. */
#ifndef DMAPROOF_RUNS_H
#define DMAPROOF_RUNS_H

#include "bitmap.h"

// Initialized with zeros; the caller frees `pairs`. `failed`: memory is exhausted.
struct runs {
    uint64_t *pairs;  // start, length
    size_t count, room;
    bool failed;
};

// Make room for `more` runs. Call it before bits are taken: without room, taken bits would be lost.
bool reserve_runs(struct runs *runs, size_t more);
// Append a run; join it to the last run if it begins where that one ends.
void add_run(struct runs *runs, uint64_t start, uint64_t length);
// Find the runs of set bits among `count` bits from `first` on, relative to `first`; clear the bits
// if `take`.
void find_runs(struct runs *runs, const struct bitmap *map, uint64_t first, uint64_t count,
               bool take);
uint64_t count_set(const struct bitmap *map, uint64_t first, uint64_t count);

#endif
