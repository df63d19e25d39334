// SPDX-License-Identifier: Apache-2.0
/* Comparison of pages. */
#ifndef DMAPROOF_PAGE_COMPARE_H
#define DMAPROOF_PAGE_COMPARE_H

#include <stddef.h>
#include <stdint.h>

// Set the bit of each of `pages` pages that differs in `left` and `right`; NULL for `right` stands
// for zeros. Return how many pages differ.
uint64_t compare_pages(const uint8_t *left, const uint8_t *right, size_t page_bytes, size_t pages,
                       uint8_t *bits);

#endif
