// SPDX-License-Identifier: Apache-2.0
/*
 * The clock: channel 0 of the 8254 timer, polled. Unlike the TSC, the timer has a known rate, which
 * is the same on the destination of a migration.
 */
#include "../machine.h"
#include "ports.h"

enum {
    TIMER = 0x40,
    TIMER_CONTROL = 0x43,
    TIMER_RATE_GENERATOR = 0x34,  // channel 0, low byte then high byte, mode 2
    TIMER_LATCH = 0x00,
    TIMER_HZ = 1193182,

    KEYBOARD_COMMAND = 0x64,
    PULSE_RESET_LINE = 0xfe,
};

void start_clock(void) {
    out8(TIMER_CONTROL, TIMER_RATE_GENERATOR);
    out8(TIMER, 0);  // 65536, so that differences modulo 65536 are right
    out8(TIMER, 0);
}

uint64_t microseconds(void) {
    static uint64_t ticks;
    static uint16_t before;
    out8(TIMER_CONTROL, TIMER_LATCH);
    uint16_t now = in8(TIMER);
    now |= (uint16_t)(in8(TIMER) << 8);
    ticks += (uint16_t)(before - now);  // the timer counts down
    before = now;
    return ticks * 1000000 / TIMER_HZ;
}

_Noreturn void reset_machine(void) {
    out8(KEYBOARD_COMMAND, PULSE_RESET_LINE);
    stop();
}

_Noreturn void stop(void) {
    for (;;)
        __asm__ volatile("hlt");  // interrupts are off
}
