// SPDX-License-Identifier: Apache-2.0
/* The line to dmaproof: reports and commands. */
#include "machine.h"

#include <stdarg.h>

static void send_text(const char *text) {
    while (*text)
        send_byte(*text++);
}

static void send_number(uint64_t number, unsigned base) {
    char digits[24];
    unsigned count = 0;
    do
        digits[count++] = "0123456789abcdef"[number % base];
    while (number /= base);
    while (count)
        send_byte(digits[--count]);
}

void report(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            send_byte(*format);
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
    send_byte('\n');
}

_Noreturn void give_up(const char *why) {
    report("fatal message=\"%s\"", why);
    stop();
}

void listen(void) {
    char command;
    while (receive_byte(&command))
        obey(command);
}
