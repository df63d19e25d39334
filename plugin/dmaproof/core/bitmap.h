// SPDX-License-Identifier: Apache-2.0
/*
 * Bitmaps in memory, word by word.
 *
 * A bitmap is a run of bytes: bit n is bit n % 8 of byte n / 8. On little-endian machines, the only
 * ones supported, this is bit n % 64 of 64-bit word n / 64, wherever the words begin. So a bitmap
 * may start and end at any address: aligned words that lie wholly inside it are accessed as words,
 * and the bytes at its ragged ends one by one. Nothing outside the bitmap is ever accessed.
 *
 * Bits of a shared bitmap are set with an atomic OR and taken with an atomic exchange. A bit that
 * is already set is not set again. The caller's fence before the call makes this sound (module.c).
 */
#ifndef DMAPROOF_BITMAP_H
#define DMAPROOF_BITMAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bitmaps of little-endian words need a little-endian machine"
#endif

#if defined(VECTORISED)
// The build has chosen: sanitizers do not work with functions that the loader selects.
#elif defined(__x86_64__) && defined(__GLIBC__)
// The loader selects the fastest variant for the machine; all are compiled from the same plain C.
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define LIKELY(condition) __builtin_expect(!!(condition), 1)

/*
 * A bitmap, divided at the machine's aligned words. `skew` bits of the first word lie before the
 * bitmap. The `whole` words from `first_whole` on lie wholly inside the bitmap.
 */
struct bitmap {
    uint64_t *base;
    unsigned skew;
    uint64_t first_whole, whole;
};

INLINE struct bitmap bitmap_of(void *data, size_t bytes) {
    uintptr_t start = (uintptr_t)data, base = start & ~(uintptr_t)7;
    uint64_t first = start != base, end = (start + bytes - base) / 8;
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

// Return the mask of `count` bits from bit `first` of a word; first + count <= 64, count > 0.
INLINE uint64_t mask_of(unsigned first, unsigned count) {
    return (~UINT64_C(0) >> (64 - count)) << first;
}

// Load a word that another thread or process may be writing. The compiler does not vectorize such
// loads; unrolled loops of them are about as fast.
INLINE uint64_t load(const uint64_t *word) {
    return atomic_load_explicit((const _Atomic uint64_t *)word, memory_order_relaxed);
}

// Return whether any bit of `count` words is set.
INLINE bool any_set(const uint64_t *words, unsigned count) {
    uint64_t any = 0;
    UNROLLED
    for (unsigned i = 0; i < count; i++)
        any |= load(words + i);
    return any != 0;
}

INLINE uint64_t load_unaligned(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

// OR `mask` into a word; return the bits that were clear before.
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

// Do the same for a word at a ragged end, byte by byte: its other bytes lie outside the bitmap.
INLINE uint64_t or_bytes(uint8_t *bytes, uint64_t mask, bool shared) {
    uint64_t added = 0;
    for (unsigned i = 0; i < 8; i++) {
        uint8_t part = (uint8_t)(mask >> (8 * i));
        if (!part)
            continue;
        uint8_t old;
        if (shared) {
            old = atomic_fetch_or((_Atomic uint8_t *)(bytes + i), part);
        } else {
            old = bytes[i];
            bytes[i] = old | part;
        }
        added |= (uint64_t)(part & ~old) << (8 * i);
    }
    return added;
}

INLINE uint64_t or_at(const struct bitmap *map, uint64_t index, uint64_t mask, bool shared) {
    uint64_t *word = map->base + index;
    return LIKELY(is_whole(map, index)) ? or_word(word, mask, shared)
                                        : or_bytes((uint8_t *)word, mask, shared);
}

// Return the bits of `mask` in word number `index`; clear them in the bitmap if `take`.
INLINE uint64_t read_at(const struct bitmap *map, uint64_t index, uint64_t mask, bool take) {
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

// A walk over a run of bits, word by word: the current bits are `mask` of word number `index`;
// `count` bits remain, the current ones included.
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

// Return how many whole words of the run begin at the cursor.
INLINE uint64_t whole_words(const struct bitmap *map, const struct cursor *at) {
    if (at->bits != 64 || !is_whole(map, at->index))
        return 0;
    uint64_t left = map->first_whole + map->whole - at->index;
    return at->count / 64 < left ? at->count / 64 : left;
}

// Skip `words` words from the cursor's word on; next_word finds the next one.
INLINE void skip_words(struct cursor *at, uint64_t words) {
    at->bit += 64 * words;
    at->count -= 64 * words;
    at->bits = 0;
}

// Set `count` bits from `first` on; return how many were clear before.
INLINE uint64_t set_run(const struct bitmap *map, uint64_t first, uint64_t count, bool shared) {
    uint64_t added = 0;
    struct cursor at = cursor_at(map, first, count);
    while (next_word(&at))
        added += (uint64_t)__builtin_popcountll(or_at(map, at.index, at.mask, shared));
    return added;
}

#endif
