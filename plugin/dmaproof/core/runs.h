// SPDX-License-Identifier: Apache-2.0
/* Runs of set bits, and the bits themselves: found, taken and counted. */
#ifndef DMAPROOF_RUNS_H
#define DMAPROOF_RUNS_H

#include "bitmap.h"

// All zeros to begin with; `pairs` is the caller's to free. `failed`: there was no memory.
struct runs {
    uint64_t *pairs;  // start, length
    size_t count, room;
    bool failed;
};

// Make room before bits are taken: there must be no moment at which they are nowhere.
bool reserve_runs(struct runs *runs, size_t more);
// Append a run; one that goes on where the last one ended is joined to it.
void add_run(struct runs *runs, uint64_t start, uint64_t length);
// The runs of set bits among `count` bits from `first`, relative to it; taken out if `take`.
void find_runs(struct runs *runs, const struct bitmap *map, uint64_t first, uint64_t count,
               bool take);
uint64_t count_set(const struct bitmap *map, uint64_t first, uint64_t count);

#endif
