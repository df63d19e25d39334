// SPDX-License-Identifier: Apache-2.0
/*
 * A radix tree of 512-entry tables, as IOMMUs walk it. Entries are told apart by the bits of
 * `kind`: at level n, (n - 1) * `table_kind` is a pointer to a table of level n - 1; anything else
 * maps memory. If `group_kind` is not 0, entries of that kind come in groups: one mapping of
 * 2^n entries' size, given by the lowest zero bit of the address (AMD v1: next level 7). Hardware
 * marks that entry of a group which it happened to walk.
 */
#ifndef DMAPROOF_PAGE_TABLE_H
#define DMAPROOF_PAGE_TABLE_H

#include "runs.h"

struct page_table {
    uint8_t *memory;
    uint64_t size;  // in bytes
    uint64_t present, dirty, address, kind, table_kind, group_kind;
    uint64_t iova, last;  // of the walk, both included
    bool mark, clear;
    struct runs runs;
    bool corrupt;
};

// Walk the table of `level` at `at` in the memory, which maps from IOVA `base` on: set the dirty
// bits of what it maps if `mark`, or else add what is dirty to `runs`, and take it if `clear`.
// `corrupt`: an entry points to a table that is not there.
void walk_page_table(struct page_table *table, uint64_t at, unsigned level, uint64_t base);

#endif
