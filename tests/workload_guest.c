// SPDX-License-Identifier: Apache-2.0
/* A guest for tests: guests/workload.c over plain memory; what it tells is kept as text. */
#include "../guests/workload.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const uint32_t piece_alignment = 8;

static uint8_t *buffer;
static char told[1 << 16];
static int told_bytes;

uint8_t *page_at(uint64_t page) {
    if (!buffer)
        buffer = calloc(buffer_pages(), PAGE_BYTES);
    return buffer + page * PAGE_BYTES;
}

uint64_t gpa_of(const void *address) {
    return (uint64_t)((const uint8_t *)address - buffer);
}

void *allocate(size_t bytes) {
    return calloc(bytes + 1, 1);
}

void tell(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    told_bytes += vsnprintf(told + told_bytes, sizeof told - told_bytes, format, arguments);
    va_end(arguments);
    told[told_bytes++] = '\n';
    told[told_bytes] = '\0';
}

uint64_t move_to_new_memory(uint64_t first, uint64_t count) {
    memset(page_at(first), 0, count * PAGE_BYTES);
    return count;
}

void pause_requests(bool wanted) {
    (void)wanted;
}

uint64_t requests_under_way(void) {
    return 3;
}

const char *everything_told(void) {
    return told;
}
