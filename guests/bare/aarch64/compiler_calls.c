// SPDX-License-Identifier: Apache-2.0
/*
 * The functions that the compiler itself calls, as there is no C library. The empty assembler
 * statements prevent the compiler from replacing a loop with a call of the function that contains
 * the loop.
 */
#include <stddef.h>
#include <stdint.h>

void *memset(void *target, int value, size_t bytes) {
    uint8_t *at = target, *end = at + bytes;
    uint64_t word = (uint8_t)value * UINT64_C(0x0101010101010101);
    for (; (uint64_t)at % sizeof word == 0 && (size_t)(end - at) >= sizeof word; at += sizeof word) {
        *(uint64_t *)at = word;
        __asm__ volatile("" : : : "memory");
    }
    while (at < end) {
        *at++ = (uint8_t)value;
        __asm__ volatile("" : : : "memory");
    }
    return target;
}

void *memcpy(void *target, const void *source, size_t bytes) {
    uint8_t *to = target;
    const uint8_t *from = source;
    while (bytes--) {
        *to++ = *from++;
        __asm__ volatile("" : : : "memory");
    }
    return target;
}
