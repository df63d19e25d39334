// SPDX-License-Identifier: Apache-2.0
/* A guest for tests: guests/workload.c over plain memory; what it reports is kept as text. */
#include "../../guests/workload.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const uint32_t piece_alignment = 8;

enum { PIECE_BYTES = 512 * PAGE_BYTES };
static const uint64_t UNMOVING_GPA = 1ULL << 32;

static uint8_t *buffer, *unmoving;
static size_t unmoving_bytes;
static char reported[1 << 16];
static int reported_bytes;

uint8_t *page_at(uint64_t page) {
    if (!buffer)
        buffer = calloc(buffer_pages(), PAGE_BYTES);
    return buffer + page * PAGE_BYTES;
}

uint64_t gpa_of(const void *address) {
    uint64_t offset = (uint64_t)((const uint8_t *)address - unmoving);
    if (unmoving && offset < unmoving_bytes)
        return UNMOVING_GPA + offset + offset / PIECE_BYTES * PIECE_BYTES;
    return (uint64_t)((const uint8_t *)address - buffer);
}

void *allocate(size_t bytes) {
    return calloc(bytes + 1, 1);
}

// Its guest-physical addresses: pieces with as much between them.
uint8_t *allocate_unmoving(size_t bytes) {
    unmoving = calloc(bytes, 1);
    unmoving_bytes = bytes;
    return unmoving;
}

void report(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    reported_bytes += vsnprintf(reported + reported_bytes, sizeof reported - reported_bytes, format, arguments);
    va_end(arguments);
    reported[reported_bytes++] = '\n';
    reported[reported_bytes] = '\0';
}

uint64_t move_to_new_memory(uint64_t first, uint64_t count) {
    memset(page_at(first), 0, count * PAGE_BYTES);
    return count;
}

void report_own_memory(void) {
    uint64_t first, count = device_pages(&first);
    report_own(0, gpa_of(page_at(first)));
    report_own(gpa_of(page_at(first + count)), gpa_of(page_at(buffer_pages())));
}

void pause_requests(bool wanted) {
    (void)wanted;
}

void reset_device(void) {
    report("reset");
}

void reload_driver(void) {
    report("reloaded");
}

_Noreturn void reset_machine(void) {
    abort();
}

uint64_t requests_under_way(void) {
    return 3;
}

const char *everything_reported(void) {
    return reported;
}
