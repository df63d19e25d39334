// SPDX-License-Identifier: Apache-2.0
#include "page_table.h"

enum { TABLE_BYTES = 4096, TABLE_ENTRIES = 512, LEVEL_BITS = 9, PAGE_SHIFT = 12 };

INLINE unsigned group_size(const struct page_table *table, uint64_t entry, unsigned shift) {
    if (!table->group_kind || (entry & table->kind) != table->group_kind)
        return 1;
    uint64_t zeros = ~((entry & table->address) >> PAGE_SHIFT);  // never 0: zeros were shifted in
    unsigned size = PAGE_SHIFT + 1 + (unsigned)__builtin_ctzll(zeros);
    return size > shift && size < shift + LEVEL_BITS ? 1u << (size - shift) : 1;
}

// Report a mapping if any of its entries is dirty. A mapping that is only partly queried stays
// dirty.
static void collect(struct page_table *table, uint64_t *entries, unsigned count, uint64_t start,
                    uint64_t end) {
    if (!reserve_runs(&table->runs, 1))
        return;
    bool whole = start >= table->iova && end <= table->last, dirty = false;
    for (unsigned i = 0; i < count; i++) {
        if (!(load(entries + i) & table->dirty))
            continue;
        dirty = true;
        if (table->clear && whole)
            atomic_fetch_and((_Atomic uint64_t *)(entries + i), ~table->dirty);
    }
    if (!dirty)
        return;
    uint64_t low = start > table->iova ? start : table->iova;
    uint64_t high = end < table->last ? end : table->last;
    add_run(&table->runs, low, high - low + 1);
}

void walk_page_table(struct page_table *table, uint64_t at, unsigned level, uint64_t base) {
    if (at % TABLE_BYTES || at > table->size || table->size - at < TABLE_BYTES) {
        table->corrupt = true;
        return;
    }
    uint64_t *entries = (uint64_t *)(table->memory + at);
    unsigned shift = PAGE_SHIFT + LEVEL_BITS * (level - 1);
    uint64_t first = table->iova > base ? (table->iova - base) >> shift : 0;
    uint64_t last = (table->last - base) >> shift;
    if (last >= TABLE_ENTRIES)
        last = TABLE_ENTRIES - 1;
    for (uint64_t i = first; i <= last && !table->corrupt && !table->runs.failed; i++) {
        uint64_t entry = load(entries + i);
        if (!(entry & table->present))
            continue;
        uint64_t start = base + (i << shift);
        if (level > 1 && (entry & table->kind) == (level - 1) * table->table_kind) {
            walk_page_table(table, entry & table->address, level - 1, start);
        } else if (table->mark) {
            if (!(entry & table->dirty))
                atomic_fetch_or((_Atomic uint64_t *)(entries + i), table->dirty);
        } else {
            unsigned group = group_size(table, entry, shift);
            uint64_t head = i & ~(uint64_t)(group - 1);
            start = base + (head << shift);
            collect(table, entries + head, group, start, start + ((uint64_t)group << shift) - 1);
            i = head + group - 1;
        }
    }
}
