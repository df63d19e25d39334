// SPDX-License-Identifier: Apache-2.0
/*
 * The line to dmaproof (the second serial port, a 16550A) and the clock (channel 0 of the 8254
 * timer), both polled. Unlike the TSC, the timer has a known rate, which is the same on the
 * destination of a migration.
 */
#include "machine.h"

#include <stdarg.h>

enum {
    COM2 = 0x2f8,
    LINE_STATUS = COM2 + 5,
    STATUS_RECEIVED = 0x01,
    STATUS_MAY_SEND = 0x20,

    TIMER = 0x40,
    TIMER_CONTROL = 0x43,
    TIMER_RATE_GENERATOR = 0x34,  // channel 0, low byte then high byte, mode 2
    TIMER_LATCH = 0x00,
    TIMER_HZ = 1193182,
};

static void send(char byte) {
    while (!(in8(LINE_STATUS) & STATUS_MAY_SEND))
        ;
    out8(COM2, (uint8_t)byte);
}

static void send_text(const char *text) {
    while (*text)
        send(*text++);
}

static void send_number(uint64_t number, unsigned base) {
    char digits[24];
    unsigned count = 0;
    do
        digits[count++] = "0123456789abcdef"[number % base];
    while (number /= base);
    while (count)
        send(digits[--count]);
}

void report(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            send(*format);
        } else if (*++format == 's') {
            send_text(va_arg(arguments, const char *));
        } else if (*format == '#') {  // %#lx
            format += 2;
            send_text("0x");
            send_number(va_arg(arguments, uint64_t), 16);
        } else {  // %lu
            format++;
            send_number(va_arg(arguments, uint64_t), 10);
        }
    }
    va_end(arguments);
    send('\n');
}

_Noreturn void stop(void) {
    for (;;)
        __asm__ volatile("hlt");  // interrupts are off
}

_Noreturn void give_up(const char *why) {
    report("fatal message=\"%s\"", why);
    stop();
}

void listen(void) {
    while (in8(LINE_STATUS) & STATUS_RECEIVED)
        obey((char)in8(COM2));
}

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
