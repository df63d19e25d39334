// SPDX-License-Identifier: Apache-2.0
#include "runs.h"

#include <stdlib.h>

enum { RUNS_IN_WORD = 32, SCAN_WORDS = 16 };

bool reserve_runs(struct runs *runs, size_t more) {
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

void add_run(struct runs *runs, uint64_t start, uint64_t length) {
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

// Return how many of `count` words are zero before the first word that is not.
VECTORISED static uint64_t zero_words(const uint64_t *words, uint64_t count) {
    uint64_t index = 0;
    while (index + SCAN_WORDS <= count && !any_set(words + index, SCAN_WORDS))
        index += SCAN_WORDS;
    while (index < count && !load(words + index))
        index++;
    return index;
}

void find_runs(struct runs *runs, const struct bitmap *map, uint64_t first, uint64_t count,
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

VECTORISED static uint64_t count_words(const uint64_t *words, uint64_t count) {
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++)
        total += (uint64_t)__builtin_popcountll(load(words + i));
    return total;
}

uint64_t count_set(const struct bitmap *map, uint64_t first, uint64_t count) {
    uint64_t total = 0;
    struct cursor at = cursor_at(map, first, count);
    while (next_word(&at)) {
        uint64_t words = whole_words(map, &at);
        if (words) {
            total += count_words(map->base + at.index, words);
            skip_words(&at, words);
            continue;
        }
        total += (uint64_t)__builtin_popcountll(read_at(map, at.index, at.mask, false));
    }
    return total;
}
