// SPDX-License-Identifier: Apache-2.0
/*
 * The functions that the compiler itself calls, as there is no C library.
 */
#include <stddef.h>

void *memset(void *target, int value, size_t bytes) {
    void *at = target;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
    return target;
}

void *memcpy(void *target, const void *source, size_t bytes) {
    void *at = target;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(source), "+c"(bytes) : : "memory");
    return target;
}
