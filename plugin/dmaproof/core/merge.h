// SPDX-License-Identifier: Apache-2.0
/* One bitmap ORed into another, which may have pages of another size. */
#ifndef DMAPROOF_MERGE_H
#define DMAPROOF_MERGE_H

#include "bitmap.h"

// OR `count` bits of `from` from bit `from_bit` on into `into`; returns how many were new there.
uint64_t merge(const struct bitmap *into, uint64_t into_bit, const struct bitmap *from,
               uint64_t from_bit, uint64_t count, bool shared);

// A bitmap with a bit for each page of 1 << shift bytes, the first for page number `first_page`.
struct page_bitmap {
    struct bitmap map;
    uint64_t first_page;
    unsigned shift;
};

// OR what `from` has of the bytes [iova, last] into `into`, and add how many bits were new there to
// `added`. Returns false if there is no memory.
bool merge_pages(const struct page_bitmap *into, const struct page_bitmap *from, uint64_t iova,
                 uint64_t last, bool shared, uint64_t *added);

#endif
