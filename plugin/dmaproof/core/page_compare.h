// SPDX-License-Identifier: Apache-2.0
/* Pages held against each other. */
#ifndef DMAPROOF_PAGE_COMPARE_H
#define DMAPROOF_PAGE_COMPARE_H

#include <stddef.h>
#include <stdint.h>

// Set the bit of each of `pages` pages of `left` that differs from `right`'s; `right` NULL stands
// for zeros. Returns how many do.
uint64_t compare_pages(const uint8_t *left, const uint8_t *right, size_t page_bytes, size_t pages,
                       uint8_t *bits);

#endif
