// SPDX-License-Identifier: Apache-2.0
/*
 * The file that the recorder shares with dmaproof: a header, and two bitmaps of equal size with one
 * bit for each page of guest-physical memory, from address 0 on. The first one has the pages that
 * the kernel has logged, and the second one those of them that were withheld from QEMU.
 *
 * dmaproof makes the file, and sets `seed` and `share`. The recorder sets everything else.
 */
#ifndef DMAPROOF_VHOST_RECORDER_H
#define DMAPROOF_VHOST_RECORDER_H

#include <stdint.h>

enum {
    RECORDER_HEADER_BYTES = 4096,
    LOG_PAGE_BYTES = 4096,  // VHOST_PAGE_SIZE
};

struct recorder_header {
    uint64_t seed;       // decides which pages are withheld
    uint64_t share;      // the share of these pages, in 1 / 2^64
    uint64_t is_loaded;  // QEMU has loaded the recorder
    uint64_t logs;       // how often QEMU has given the kernel a log
    uint64_t too_large;  // a log is larger than the bitmaps, so the recorder does not see it
};

#endif
