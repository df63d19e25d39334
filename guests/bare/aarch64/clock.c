// SPDX-License-Identifier: Apache-2.0
/*
 * The clock: the virtual counter of the generic timer. Its rate is readable, and the counter
 * continues evenly after a migration.
 */
#include "../machine.h"

static uint64_t first;

static uint64_t counter(void) {
    uint64_t ticks;
    __asm__ volatile("isb\n\tmrs %0, cntvct_el0" : "=r"(ticks) : : "memory");
    return ticks;
}

void start_clock(void) {
    first = counter();
}

uint64_t microseconds(void) {
    uint64_t hz, ticks = counter() - first;
    __asm__("mrs %0, cntfrq_el0" : "=r"(hz));
    return ticks / hz * 1000000 + ticks % hz * 1000000 / hz;
}

// SYSTEM_RESET of PSCI (Arm DEN 0022, section 5.1.12), which QEMU's virt machine provides by HVC.
_Noreturn void reset_machine(void) {
    register uint64_t function __asm__("x0") = 0x84000009;
    __asm__ volatile("hvc #0" : "+r"(function) : : "memory");
    stop();
}

_Noreturn void stop(void) {
    for (;;)
        __asm__ volatile("wfi");  // interrupts are masked
}
