// SPDX-License-Identifier: Apache-2.0
/*
 * Atomics and memory-bandwidth loops, and nothing else.
 *
 * A bitmap is a run of bytes: bit n is bit n % 8 of byte n / 8. On the little-endian machines that
 * this is written for, that is the same as bit n % 64 of 64-bit word n / 64, wherever the words
 * begin, so a bitmap may start and end at any address: aligned words that lie wholly inside it are
 * used whole, the bytes at its ragged ends one by one. Nothing outside is ever touched.
 *
 * Bits of a shared bitmap are set with an atomic OR and taken with an atomic exchange. A bit that
 * is already set is not set again: the fence before that look is what makes it sound. Whoever takes
 * the bit later then finds the data that was written before the fence; without it the data might
 * still sit in a store buffer while the old bit is taken and the old data read.
 *
 * Every function checks its bounds before it writes, and works without the GIL.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bitmaps of little-endian words need a little-endian machine"
#endif

#if defined(VECTORISED)
// The build has chosen: sanitizers do not work with functions that the loader picks.
#elif defined(__x86_64__) && defined(__GLIBC__)
// The loader picks the fastest form that the machine has; the code is the same plain C for all.
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINE static inline __attribute__((always_inline))
#define LIKELY(condition) __builtin_expect(!!(condition), 1)

enum { PREFETCH_AHEAD = 32 };

// Bitmaps ----------------------------------------------------------------------------------------

/*
 * A bitmap cut at the machine's aligned words. `skew` bits of the first word lie before the bitmap;
 * the `whole` words from `first_whole` on lie wholly inside it.
 */
struct bitmap {
    uint64_t *base;
    unsigned skew;
    uint64_t first_whole, whole;
};

static struct bitmap bitmap_of(const Py_buffer *view) {
    uintptr_t start = (uintptr_t)view->buf, base = start & ~(uintptr_t)7;
    uint64_t first = start != base, end = (start + (uintptr_t)view->len - base) / 8;
    return (struct bitmap){
        .base = (uint64_t *)base,
        .skew = (unsigned)(start - base) * 8,
        .first_whole = first,
        .whole = end > first ? end - first : 0,
    };
}

INLINE bool is_whole(const struct bitmap *map, uint64_t index) {
    return index - map->first_whole < map->whole;
}

// The mask of `count` bits from bit `first` of a word; first + count <= 64, count > 0.
INLINE uint64_t mask_of(unsigned first, unsigned count) {
    return (~UINT64_C(0) >> (64 - count)) << first;
}

INLINE uint64_t load(const uint64_t *word) {
    return atomic_load_explicit((const _Atomic uint64_t *)word, memory_order_relaxed);
}

// OR `mask` into a word; returns the bits that were not set before.
INLINE uint64_t or_word(uint64_t *word, uint64_t mask, bool shared) {
    uint64_t old = load(word);
    if ((old & mask) == mask)
        return 0;
    if (shared)
        old = atomic_fetch_or((_Atomic uint64_t *)word, mask);
    else
        *word = old | mask;
    return mask & ~old;
}

// The same for a word at a ragged end, byte by byte: the other bytes are not the bitmap's.
static uint64_t or_bytes(uint8_t *bytes, uint64_t mask, bool shared) {
    uint64_t added = 0;
    for (unsigned i = 0; i < 8; i++) {
        uint8_t part = (uint8_t)(mask >> (8 * i));
        if (!part)
            continue;
        uint8_t old = bytes[i];
        if (shared)
            old = atomic_fetch_or((_Atomic uint8_t *)(bytes + i), part);
        else
            bytes[i] = old | part;
        added |= (uint64_t)(part & ~old) << (8 * i);
    }
    return added;
}

INLINE uint64_t or_at(const struct bitmap *map, uint64_t index, uint64_t mask, bool shared) {
    uint64_t *word = map->base + index;
    return LIKELY(is_whole(map, index)) ? or_word(word, mask, shared)
                                        : or_bytes((uint8_t *)word, mask, shared);
}

// The bits of `mask` in word number `index`; cleared there if `take`.
static uint64_t read_at(const struct bitmap *map, uint64_t index, uint64_t mask, bool take) {
    uint64_t *word = map->base + index, value = 0;
    if (LIKELY(is_whole(map, index))) {
        value = load(word) & mask;
        if (value && take)
            value = mask == ~UINT64_C(0) ? atomic_exchange((_Atomic uint64_t *)word, 0)
                                         : atomic_fetch_and((_Atomic uint64_t *)word, ~mask) & mask;
        return value;
    }
    _Atomic uint8_t *bytes = (_Atomic uint8_t *)word;
    for (unsigned i = 0; i < 8; i++) {
        uint8_t part = (uint8_t)(mask >> (8 * i));
        if (part) {
            uint8_t old = take ? atomic_fetch_and(bytes + i, (uint8_t)~part) : bytes[i];
            value |= (uint64_t)(old & part) << (8 * i);
        }
    }
    return value;
}

// How many of `count` words are zero before the first that is not.
VECTORISED static uint64_t zero_words(const uint64_t *words, uint64_t count) {
    uint64_t index = 0;
    for (; index + 32 <= count; index += 32) {
        uint64_t any = 0;
        for (unsigned i = 0; i < 32; i++)
            any |= words[index + i];
        if (any)
            break;
    }
    while (index < count && !words[index])
        index++;
    return index;
}

VECTORISED static uint64_t count_words(const uint64_t *words, uint64_t count) {
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++)
        total += (uint64_t)__builtin_popcountll(words[i]);
    return total;
}

// A run of bits is walked word by word: `mask` of word number `index`, until `count` is used up.
struct cursor {
    uint64_t bit, count;
    uint64_t index, mask;
    unsigned bits;
};

INLINE struct cursor cursor_at(const struct bitmap *map, uint64_t first, uint64_t count) {
    return (struct cursor){.bit = first + map->skew, .count = count};
}

INLINE bool next_word(struct cursor *at) {
    at->bit += at->bits;
    at->count -= at->bits;
    if (!at->count)
        return false;
    unsigned offset = at->bit % 64;
    at->bits = at->count < 64 - offset ? (unsigned)at->count : 64 - offset;
    at->index = at->bit / 64;
    at->mask = mask_of(offset, at->bits);
    return true;
}

// How many whole words of the run begin at the cursor.
INLINE uint64_t whole_words(const struct bitmap *map, const struct cursor *at) {
    if (at->bits != 64 || !is_whole(map, at->index))
        return 0;
    uint64_t left = map->first_whole + map->whole - at->index;
    return at->count / 64 < left ? at->count / 64 : left;
}

// Pass over `words` words from the cursor's on; the next is found by next_word.
INLINE void skip_words(struct cursor *at, uint64_t words) {
    at->bit += 64 * words;
    at->count -= 64 * words;
    at->bits = 0;
}

// Set `count` bits from `first` on; returns how many were not set before.
INLINE uint64_t set_run(const struct bitmap *map, uint64_t first, uint64_t count, bool shared) {
    uint64_t added = 0;
    struct cursor at = cursor_at(map, first, count);
    while (next_word(&at))
        added += (uint64_t)__builtin_popcountll(or_at(map, at.index, at.mask, shared));
    return added;
}

// Runs of set bits -------------------------------------------------------------------------------

enum { RUNS_IN_WORD = 32 };

struct runs {
    uint64_t *pairs;  // start, length
    size_t count, room;
    bool failed;
};

// Make room before bits are taken: there must be no moment at which they are nowhere.
static bool reserve_runs(struct runs *runs, size_t more) {
    if (runs->room - runs->count >= more)
        return true;
    size_t room = 2 * runs->room + 256;
    uint64_t *pairs = realloc(runs->pairs, room * 2 * sizeof *pairs);
    if (!pairs) {
        runs->failed = true;
        return false;
    }
    runs->pairs = pairs;
    runs->room = room;
    return true;
}

static void add_run(struct runs *runs, uint64_t start, uint64_t length) {
    if (runs->count) {
        uint64_t *last = runs->pairs + 2 * (runs->count - 1);
        if (last[0] + last[1] == start) {
            last[1] += length;
            return;
        }
    }
    runs->pairs[2 * runs->count] = start;
    runs->pairs[2 * runs->count + 1] = length;
    runs->count++;
}

static PyObject *give_runs(struct runs *runs, bool refused) {
    PyObject *answer = NULL;
    if (runs->failed)
        PyErr_NoMemory();
    else if (!refused)
        answer = PyBytes_FromStringAndSize((const char *)runs->pairs,
                                           (Py_ssize_t)(runs->count * 2 * sizeof *runs->pairs));
    free(runs->pairs);
    return answer;
}

// The runs of set bits among `count` bits from `first`, relative to it; taken out if `take`.
static void find_runs(struct runs *runs, const struct bitmap *map, uint64_t first, uint64_t count,
                      bool take) {
    uint64_t origin = first + map->skew;
    struct cursor at = cursor_at(map, first, count);
    while (next_word(&at) && reserve_runs(runs, RUNS_IN_WORD)) {
        uint64_t empty = zero_words(map->base + at.index, whole_words(map, &at));
        if (empty) {
            skip_words(&at, empty);
            continue;
        }
        uint64_t value = read_at(map, at.index, at.mask, take);
        while (value) {
            unsigned start = (unsigned)__builtin_ctzll(value);
            uint64_t rest = ~(value >> start);
            unsigned length = rest ? (unsigned)__builtin_ctzll(rest) : 64;
            add_run(runs, at.index * 64 + start - origin, length);
            value &= ~mask_of(start, length);
        }
    }
}

// Merging ----------------------------------------------------------------------------------------

INLINE uint64_t load_unaligned(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

// 64 bits from bit `shift` (0 to 7) of `bytes` on; byte 8 is read only if it holds some of them.
INLINE uint64_t load_shifted(const uint8_t *bytes, unsigned shift) {
    if (shift == 0)
        return load_unaligned(bytes);
    return load_unaligned(bytes) >> shift | load_unaligned(bytes + 1) << (8 - shift);
}

enum { BLOCK_WORDS = 8 };

// OR whole words; blocks that bring nothing new, as most do, are only read.
INLINE uint64_t merge_block(uint64_t *to, const uint8_t *from, unsigned shift, unsigned words,
                            bool shared) {
    uint64_t added = 0, any = 0, fresh[BLOCK_WORDS];
    for (unsigned i = 0; i < words; i++)
        any |= fresh[i] = load_shifted(from + 8 * i, shift);
    if (!any)
        return 0;
    any = 0;
    for (unsigned i = 0; i < words; i++)
        any |= fresh[i] &= ~to[i];
    if (!any)
        return 0;
    for (unsigned i = 0; i < words; i++) {
        if (shared)
            fresh[i] = fresh[i] ? or_word(to + i, fresh[i], true) : 0;
        else
            to[i] |= fresh[i];
        added += (uint64_t)__builtin_popcountll(fresh[i]);
    }
    return added;
}

INLINE uint64_t merge_shifted(uint64_t *to, const uint8_t *from, unsigned shift, uint64_t count,
                              bool shared) {
    uint64_t added = 0, i = 0;
    for (; i + BLOCK_WORDS <= count; i += BLOCK_WORDS)
        added += merge_block(to + i, from + 8 * i, shift, BLOCK_WORDS, shared);
    return added + merge_block(to + i, from + 8 * i, shift, (unsigned)(count - i), shared);
}

VECTORISED static uint64_t merge_words(uint64_t *to, const uint8_t *from, unsigned shift,
                                       uint64_t count, bool shared) {
    if (shift)
        return merge_shifted(to, from, shift, count, shared);
    return shared ? merge_shifted(to, from, 0, count, true)
                  : merge_shifted(to, from, 0, count, false);
}

// OR `count` bits of `from` from bit `from_bit` on into `into`; returns how many were new there.
static uint64_t merge(const struct bitmap *into, uint64_t into_bit, const struct bitmap *from,
                      uint64_t from_bit, uint64_t count, bool shared) {
    uint64_t added = 0;
    const uint8_t *bytes = (const uint8_t *)from->base;
    struct cursor at = cursor_at(into, into_bit, count);
    while (next_word(&at)) {
        uint64_t source = from_bit + from->skew + (count - at.count), value = 0;
        uint64_t words = whole_words(into, &at);
        if (words) {
            added += merge_words(into->base + at.index, bytes + source / 8, source % 8, words,
                                 shared);
            skip_words(&at, words);
            continue;
        }
        struct cursor part = {.bit = source, .count = at.bits};
        for (unsigned done = 0; next_word(&part); done += part.bits)
            value |= read_at(from, part.index, part.mask, false) >> part.bit % 64 << done;
        if (value)
            added += (uint64_t)__builtin_popcountll(
                or_at(into, at.index, value << at.bit % 64, shared));
    }
    return added;
}

// Page tables ------------------------------------------------------------------------------------

/*
 * A radix tree of 512-entry tables, as IOMMUs walk it. Entries are told apart by the bits of
 * `kind`: at level n, (n - 1) * `table_kind` is a pointer to a table of level n - 1; anything else
 * maps memory. If `group_kind` is not 0, entries of that kind come in groups: one mapping of
 * 2^n entries' size, given by the lowest zero bit of the address (AMD v1: next level 7). Hardware
 * marks that entry of a group which it happened to walk.
 */
struct page_table {
    uint8_t *memory;
    uint64_t size;  // in bytes
    uint64_t present, dirty, address, kind, table_kind, group_kind;
    uint64_t iova, last;  // of the walk, both included
    bool mark, clear;
    struct runs runs;
    bool corrupt;
};

enum { TABLE_BYTES = 4096, TABLE_ENTRIES = 512, LEVEL_BITS = 9, PAGE_SHIFT = 12 };

INLINE unsigned group_size(const struct page_table *table, uint64_t entry, unsigned shift) {
    if (!table->group_kind || (entry & table->kind) != table->group_kind)
        return 1;
    uint64_t inverted = ~((entry & table->address) >> PAGE_SHIFT);
    unsigned size = inverted ? PAGE_SHIFT + 1 + (unsigned)__builtin_ctzll(inverted) : 64;
    return size > shift && size < shift + LEVEL_BITS ? 1u << (size - shift) : 1;
}

// Report a mapping of which some entry is dirty; what is not wholly asked for stays dirty.
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

static void walk(struct page_table *table, uint64_t at, unsigned level, uint64_t base) {
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
            walk(table, entry & table->address, level - 1, start);
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

// Arguments --------------------------------------------------------------------------------------

static int refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

static int check_bits(const Py_buffer *view, uint64_t first, uint64_t count, const char *name) {
    uint64_t bits = (uint64_t)view->len * 8;
    if (first > bits || count > bits - first) {
        PyErr_Format(PyExc_ValueError, "%s: %llu bits from bit %llu on, of a bitmap with %llu", name,
                     (unsigned long long)count, (unsigned long long)first,
                     (unsigned long long)bits);
        return -1;
    }
    return 0;
}

// The same for the bits up to `last`, which is included: all of 2^64 pages may be asked for.
static int check_last_bit(const Py_buffer *view, uint64_t last, const char *name) {
    return check_bits(view, last, 1, name);
}

static PyObject *fence(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    atomic_thread_fence(memory_order_seq_cst);
    Py_RETURN_NONE;
}

static PyObject *set_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data;
    unsigned long long first, count;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*KK|p", &data, &first, &count, &shared))
        return NULL;
    uint64_t added = 0;
    int refused = check_bits(&data, first, count, "set_bits");
    if (!refused) {
        struct bitmap map = bitmap_of(&data);
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        added = set_run(&map, first, count, shared);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

// Ranges of bytes, to be set in a bitmap over the bytes [first, last] with pages of 1 << shift.
struct ranges {
    const uint64_t *iovas, *lengths;  // no lengths: all have `length`
    uint64_t length;
    size_t count;
    uint64_t first, last;
    unsigned shift;
};

struct survey {
    bool inside;   // every range is wholly inside, and none empty
    bool single;   // every range touches one page
    bool near;     // most neighbours in the list lie in one cache line of the bitmap
    bool crowded;  // … in one word
};

enum { LINE_BITS = 512 };

INLINE struct survey survey_each(const struct ranges *ranges, const uint64_t *lengths) {
    const uint64_t *iovas = ranges->iovas;
    uint64_t outside = 0, wide = 0, other_line = 0, other_word = 0, count = ranges->count;
    uint64_t first = ranges->first, room = ranges->last - first, length = ranges->length - 1;
    uint64_t in_page = (UINT64_C(1) << ranges->shift) - 1;
    // The bits in which two IOVAs may differ and still be in one word; in a huge page all may.
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
                   (uint64_t)(end == ~UINT64_C(0));  // empty: nothing else excludes it at 2^64
        wide |= ((iovas[i] & in_page) + end) & ~in_page;
    }
    return (struct survey){!outside, !wide, other_line < count / 8, other_word < count / 8};
}

VECTORISED static struct survey survey_ranges(const struct ranges *ranges) {
    return ranges->lengths ? survey_each(ranges, ranges->lengths) : survey_each(ranges, NULL);
}

INLINE uint64_t set_page(uint64_t *base, uint64_t page, bool shared) {
    uint64_t *word = base + page / 64, bit = UINT64_C(1) << page % 64, old = load(word);
    if (!shared) {
        *word = old | bit;
        return !(old & bit);
    }
    // Of one bit the compiler makes a single locked instruction, of a mask a loop of them.
    return old & bit ? 0 : !(atomic_fetch_or((_Atomic uint64_t *)word, bit) & bit);
}

// Pages in whole words, in any order.
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

// The same where neighbours often share a word, which is then written once for all of them.
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

static PyObject *set_ranges(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data, iovas, lengths = {0};
    unsigned long long first, last, length = 0;
    unsigned shift;
    int shared;
    PyObject *of_each;
    if (!PyArg_ParseTuple(args, "w*KKIy*Op", &data, &first, &last, &shift, &iovas, &of_each,
                          &shared))
        return NULL;
    uint64_t added = 0;
    int refused = 0;
    if (PyLong_Check(of_each)) {
        length = PyLong_AsUnsignedLongLong(of_each);
        refused = PyErr_Occurred() != NULL;
    } else {
        refused = PyObject_GetBuffer(of_each, &lengths, PyBUF_SIMPLE);
    }
    if (!refused && ((lengths.obj && iovas.len != lengths.len) || iovas.len % 8 || shift > 63 ||
                     last < first))
        refused = refuse("set_ranges: two arrays of 64-bit words, of one length, are due");
    if (!refused)
        refused = check_last_bit(&data, (last >> shift) - (first >> shift), "set_ranges");
    if (!refused) {
        struct bitmap map = bitmap_of(&data);
        struct ranges ranges = {iovas.buf, lengths.buf, length, (size_t)iovas.len / 8,
                                first,     last,        shift};
        struct survey survey;
        Py_BEGIN_ALLOW_THREADS
        survey = survey_ranges(&ranges);
        if (survey.inside) {
            atomic_thread_fence(memory_order_seq_cst);
            added = shared ? set_shared(&map, &ranges, survey)
                           : set_private(&map, &ranges, survey);
        }
        Py_END_ALLOW_THREADS
        if (!survey.inside)
            refused = refuse("set_ranges: a range is empty or not wholly inside the bitmap's");
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&iovas);
    PyBuffer_Release(&lengths);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *or_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer into, from;
    unsigned long long into_bit, from_bit, count;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*Ky*KK|p", &into, &into_bit, &from, &from_bit, &count, &shared))
        return NULL;
    uint64_t added = 0;
    int refused = check_bits(&into, into_bit, count, "or_bits, target") ||
                  check_bits(&from, from_bit, count, "or_bits, source");
    if (!refused) {
        struct bitmap target = bitmap_of(&into), source = bitmap_of(&from);
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        added = merge(&target, into_bit, &source, from_bit, count, shared);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&from);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

/*
 * OR of a bitmap into one with pages of another size, by IOVA. Runs are sought in pieces, so that
 * memory for them stays small however full the bitmap is.
 */
enum { PIECE_BITS = 1 << 20 };

static PyObject *or_pages(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer into, from;
    unsigned long long into_page, from_page, iova, last;
    unsigned into_shift, from_shift;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*KIy*KIKK|p", &into, &into_page, &into_shift, &from, &from_page,
                          &from_shift, &iova, &last, &shared))
        return NULL;
    uint64_t added = 0;
    struct runs runs = {0};
    int refused = 0;
    if (into_shift > 63 || from_shift > 63 || last < iova || iova >> into_shift < into_page ||
        iova >> from_shift < from_page)
        refused = refuse("or_pages: the range begins before a bitmap, or is empty");
    if (!refused)
        refused = check_last_bit(&into, (last >> into_shift) - into_page, "or_pages, target") ||
                  check_last_bit(&from, (last >> from_shift) - from_page, "or_pages, source");
    if (!refused) {
        struct bitmap target = bitmap_of(&into), source = bitmap_of(&from);
        uint64_t bit = (iova >> from_shift) - from_page;
        uint64_t end = (last >> from_shift) - from_page + 1;
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        for (uint64_t here; bit < end && !runs.failed; bit += here) {
            here = end - bit < PIECE_BITS ? end - bit : PIECE_BITS;
            runs.count = 0;
            find_runs(&runs, &source, bit, here, false);
            for (size_t i = 0; i < runs.count; i++) {
                uint64_t page = from_page + bit + runs.pairs[2 * i];
                uint64_t start = page << from_shift;
                uint64_t stop = ((page + runs.pairs[2 * i + 1]) << from_shift) - 1;  // may wrap
                uint64_t low = (start > iova ? start : iova) >> into_shift;
                uint64_t high = (stop < last ? stop : last) >> into_shift;
                added += set_run(&target, low - into_page, high - low + 1, shared);
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&from);
    if (runs.failed)
        PyErr_NoMemory();
    free(runs.pairs);
    return refused || runs.failed ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *runs_of(PyObject *args, const char *format, bool take) {
    Py_buffer data;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, format, &data, &first, &count))
        return NULL;
    struct runs runs = {0};
    int refused = check_bits(&data, first, count, "runs");
    if (!refused) {
        struct bitmap map = bitmap_of(&data);
        Py_BEGIN_ALLOW_THREADS
        find_runs(&runs, &map, first, count, take);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return give_runs(&runs, refused);
}

static PyObject *find_set(PyObject *module, PyObject *args) {
    (void)module;
    return runs_of(args, "y*KK", false);
}

static PyObject *take_set(PyObject *module, PyObject *args) {
    (void)module;
    return runs_of(args, "w*KK", true);
}

static PyObject *count_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, "y*KK", &data, &first, &count))
        return NULL;
    uint64_t total = 0;
    int refused = check_bits(&data, first, count, "count_bits");
    if (!refused) {
        struct bitmap map = bitmap_of(&data);
        Py_BEGIN_ALLOW_THREADS
        struct cursor at = cursor_at(&map, first, count);
        while (next_word(&at)) {
            uint64_t words = whole_words(&map, &at);
            if (words) {
                total += count_words(map.base + at.index, words);
                skip_words(&at, words);
                continue;
            }
            total += (uint64_t)__builtin_popcountll(read_at(&map, at.index, at.mask, false));
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return refused ? NULL : PyLong_FromUnsignedLongLong(total);
}

static PyObject *walk_table(PyObject *args, const char *format, bool mark) {
    Py_buffer memory;
    unsigned long long root, present, dirty, address, kind, table_kind, group_kind, iova, last;
    unsigned levels;
    int clear = 0;
    if (!PyArg_ParseTuple(args, format, &memory, &root, &levels, &present, &dirty, &address, &kind,
                          &table_kind, &group_kind, &iova, &last, &clear))
        return NULL;
    struct page_table table = {
        .memory = memory.buf, .size = (uint64_t)memory.len, .present = present, .dirty = dirty,
        .address = address, .kind = kind, .table_kind = table_kind, .group_kind = group_kind,
        .iova = iova, .last = last, .mark = mark, .clear = clear,
    };
    int refused = 0;
    if (levels < 1 || levels > 6 || (uintptr_t)memory.buf % 8 || last < iova)
        refused = refuse("walk: 1 to 6 levels, aligned memory and a range that is not empty are due");
    if (!refused) {
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        walk(&table, root, levels, 0);
        Py_END_ALLOW_THREADS
        if (table.corrupt)
            refused = refuse("walk: an entry points to a table outside the tables' memory");
    }
    PyBuffer_Release(&memory);
    return give_runs(&table.runs, refused);
}

static PyObject *mark_table(PyObject *module, PyObject *args) {
    (void)module;
    return walk_table(args, "w*KIKKKKKKKK", true);
}

static PyObject *read_table(PyObject *module, PyObject *args) {
    (void)module;
    return walk_table(args, "w*KIKKKKKKKKp", false);
}

VECTORISED static bool all_zero(const uint8_t *bytes, size_t size) {
    size_t at = 0;
    for (; at + 256 <= size; at += 256) {
        uint64_t any = 0;
        for (unsigned i = 0; i < 256; i += 8)
            any |= load_unaligned(bytes + at + i);
        if (any)
            return false;
    }
    for (; at < size; at++) {
        if (bytes[at])
            return false;
    }
    return true;
}

/*
 * differing_pages(a, b, page_size, differing) -> pages that differ
 *
 * Sets the bit of each page of `a` that differs from `b`'s; `b` None stands for zeros.
 */
static PyObject *differing_pages(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer a, b = {0}, differing;
    PyObject *other;
    Py_ssize_t page_size;
    if (!PyArg_ParseTuple(args, "y*Onw*", &a, &other, &page_size, &differing))
        return NULL;
    int refused = 0;
    uint64_t total = 0;
    if (other != Py_None)
        refused = PyObject_GetBuffer(other, &b, PyBUF_SIMPLE);
    if (!refused && (page_size < 1 || a.len % page_size || (b.obj && b.len != a.len)))
        refused = refuse("differing_pages: two runs of whole pages, of one size, are due");
    if (!refused)
        refused = check_bits(&differing, 0, (uint64_t)(a.len / page_size), "differing_pages");
    if (!refused) {
        const uint8_t *left = a.buf, *right = b.buf;
        uint8_t *bits = differing.buf;
        size_t size = (size_t)page_size, pages = (size_t)a.len / size;
        Py_BEGIN_ALLOW_THREADS
        for (size_t page = 0; page < pages; page++) {
            bool equal = right ? memcmp(left + page * size, right + page * size, size) == 0
                               : all_zero(left + page * size, size);
            if (!equal) {
                bits[page / 8] |= (uint8_t)(1 << page % 8);
                total++;
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    PyBuffer_Release(&differing);
    return refused ? NULL : PyLong_FromUnsignedLongLong(total);
}

static PyMethodDef methods[] = {
    {"fence", fence, METH_NOARGS, "A full memory barrier (C11 seq_cst)."},
    {"set_bits", set_bits, METH_VARARGS,
     "set_bits(data, first_bit, bits, shared=True) -> bits newly set"},
    {"set_ranges", set_ranges, METH_VARARGS,
     "set_ranges(data, iova, last, page_shift, iovas, lengths, shared) -> bits newly set; "
     "lengths: an array, or one number for all"},
    {"or_bits", or_bits, METH_VARARGS,
     "or_bits(into, into_bit, source, source_bit, bits, shared=True) -> bits newly set"},
    {"or_pages", or_pages, METH_VARARGS,
     "or_pages(into, page, shift, source, page, shift, iova, last, shared=True) -> newly set"},
    {"find_set", find_set, METH_VARARGS, "find_set(data, first_bit, bits) -> (start, length) pairs"},
    {"take_set", take_set, METH_VARARGS,
     "take_set(data, first_bit, bits) -> (start, length) pairs, cleared atomically"},
    {"count_bits", count_bits, METH_VARARGS, "count_bits(data, first_bit, bits) -> set bits"},
    {"mark_table", mark_table, METH_VARARGS,
     "mark_table(memory, root, levels, *layout, iova, last): set dirty bits"},
    {"read_table", read_table, METH_VARARGS,
     "read_table(memory, root, levels, *layout, iova, last, clear) -> (iova, length) pairs"},
    {"differing_pages", differing_pages, METH_VARARGS,
     "differing_pages(a, b, page_size, differing) -> pages that differ"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "Atomics and memory-bandwidth loops.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
