// SPDX-License-Identifier: Apache-2.0
/*
 * A radix tree of 512-entry tables, as IOMMUs walk it. The bits of `kind` give the kind of an
 * entry: at level n, (n - 1) * `table_kind` is a pointer to a table of level n - 1; any other value
 * maps memory. If `group_kind` is not 0, entries of that kind form groups: one mapping of the size
 * of 2^n entries, given by the lowest zero bit of the address (AMD v1: next level 7). Hardware
 * marks the entry of a group that it happened to walk.
 */
#ifndef DMAPROOF_PAGE_TABLE_H
#define DMAPROOF_PAGE_TABLE_H

#include "runs.h"

struct page_table {
    uint8_t *memory;
    uint64_t size;  // in bytes
    uint64_t present, dirty, address, kind, table_kind, group_kind;
    uint64_t iova, last;  // the range of the walk, both included
    bool mark, clear;
    struct runs runs;
    bool corrupt;
};

// Walk the table of `level` at byte `at` of the memory, which maps from IOVA `base` on. If `mark`,
// set the dirty bits of its entries. Otherwise add the dirty mappings to `runs`, and clear their
// bits if `clear`. `corrupt` is set if an entry points to a table outside the memory.
void walk_page_table(struct page_table *table, uint64_t at, unsigned level, uint64_t base);

#endif
