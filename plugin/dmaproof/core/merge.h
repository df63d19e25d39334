// SPDX-License-Identifier: Apache-2.0
/* OR of one bitmap into another, which may have another page size. */
#ifndef DMAPROOF_MERGE_H
#define DMAPROOF_MERGE_H

#include "bitmap.h"

// OR `count` bits of `from` from bit `from_bit` on into `into`; return how many were new there.
uint64_t merge(const struct bitmap *into, uint64_t into_bit, const struct bitmap *from,
               uint64_t from_bit, uint64_t count, bool shared);

// A bitmap with one bit for each page of 1 << shift bytes, from page number `first_page` on.
struct page_bitmap {
    struct bitmap map;
    uint64_t first_page;
    unsigned shift;
};

// OR the pages of `from` within the bytes [iova, last] into `into`, and add to `added` how many
// bits were new there. Return false if memory is exhausted.
bool merge_pages(const struct page_bitmap *into, const struct page_bitmap *from, uint64_t iova,
                 uint64_t last, bool shared, uint64_t *added);

#endif
