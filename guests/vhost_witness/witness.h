// SPDX-License-Identifier: Apache-2.0
/*
 * The file that the witness shares with dmaproof: a header, and two bitmaps of equal size with one
 * bit for each page of guest-physical memory, from address 0 on. The first one has the pages that
 * the kernel has logged, and the second one those of them that were withheld from QEMU.
 *
 * dmaproof makes the file, and sets `seed` and `share`. The witness sets everything else.
 */
#ifndef DMAPROOF_VHOST_WITNESS_H
#define DMAPROOF_VHOST_WITNESS_H

#include <stdint.h>

enum {
    WITNESS_HEADER_BYTES = 4096,
    LOG_PAGE_BYTES = 4096,  // VHOST_PAGE_SIZE
};

struct witness_header {
    uint64_t seed;       // decides which pages are withheld
    uint64_t share;      // the share of these pages, in 1 / 2^64
    uint64_t is_loaded;  // QEMU has loaded the witness
    uint64_t logs;       // how often QEMU has given the kernel a log
    uint64_t too_large;  // a log is larger than the bitmaps, so the witness does not see it
};

#endif
