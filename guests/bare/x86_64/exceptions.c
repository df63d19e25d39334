// SPDX-License-Identifier: Apache-2.0
/*
 * Exceptions: they happen only if a migration has lost memory. The guest reports the exception to
 * dmaproof. Without a handler, the CPU would reset without a message.
 */
#include "../machine.h"

enum {
    EXCEPTIONS = 32,
    STUB_BYTES = 16,
    CODE_SELECTOR = 8,
    INTERRUPT_GATE = 0x8e,
};
// The exceptions for which the CPU pushes an error code (Intel SDM, volume 3, table 6-1).
static const uint32_t WITH_ERROR_CODE = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21;

extern const uint8_t exception_stubs[];  // start.S

static struct gate {
    uint16_t offset_low, selector;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
} gates[EXCEPTIONS];

void catch_exceptions(void) {
    for (unsigned vector = 0; vector < EXCEPTIONS; vector++) {
        uint64_t stub = (uint64_t)exception_stubs + vector * STUB_BYTES;
        gates[vector] = (struct gate){
            .offset_low = (uint16_t)stub,
            .selector = CODE_SELECTOR,
            .type = INTERRUPT_GATE,
            .offset_middle = (uint16_t)(stub >> 16),
            .offset_high = (uint32_t)(stub >> 32),
        };
    }
    struct __attribute__((packed)) {
        uint16_t limit;
        const void *base;
    } table = {sizeof gates - 1, gates};
    __asm__ volatile("lidt %0" : : "m"(table));
}

// Called by start.S: `top` and `next` are the first two words on the stack, CR2 is the last
// faulting address.
_Noreturn void exception_raised(uint64_t vector, uint64_t cr2, uint64_t top, uint64_t next) {
    uint64_t rip = WITH_ERROR_CODE >> vector & 1 ? next : top;
    report("fatal message=\"exception %lu at %#lx, CR2 %#lx\"", vector, rip, cr2);
    stop();
}
