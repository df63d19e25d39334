// SPDX-License-Identifier: Apache-2.0
#include "page_compare.h"

#include "bitmap.h"

#include <string.h>

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

uint64_t compare_pages(const uint8_t *left, const uint8_t *right, size_t page_bytes, size_t pages,
                       uint8_t *bits) {
    uint64_t total = 0;
    for (size_t page = 0; page < pages; page++) {
        size_t at = page * page_bytes;
        bool equal = right ? memcmp(left + at, right + at, page_bytes) == 0
                           : all_zero(left + at, page_bytes);
        if (!equal) {
            bits[page / 8] |= (uint8_t)(1 << page % 8);
            total++;
        }
    }
    return total;
}
