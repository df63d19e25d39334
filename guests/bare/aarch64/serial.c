// SPDX-License-Identifier: Apache-2.0
/* The serial port to dmaproof: the PL011 of QEMU's machine `virt` (VIRT_UART in hw/arm/virt.c). */
#include "../machine.h"

enum {
    PL011 = 0x9000000,
    DATA = 0x00,
    FLAGS = 0x18,
    FLAG_NOTHING_RECEIVED = 1 << 4,
    FLAG_MAY_NOT_SEND = 1 << 5,
    LINE_CONTROL = 0x2c,
    LINE_8_BITS_WITH_FIFOS = 0x70,
    CONTROL = 0x30,
    CONTROL_ENABLE_BOTH_WAYS = 0x301,
};

static volatile uint32_t *register_at(unsigned offset) {
    return (volatile uint32_t *)(uint64_t)(PL011 + offset);
}

// No firmware has enabled the port.
static void enable(void) {
    if (*register_at(CONTROL) == CONTROL_ENABLE_BOTH_WAYS)
        return;
    *register_at(LINE_CONTROL) = LINE_8_BITS_WITH_FIFOS;
    *register_at(CONTROL) = CONTROL_ENABLE_BOTH_WAYS;
}

void send_byte(char byte) {
    enable();
    while (*register_at(FLAGS) & FLAG_MAY_NOT_SEND)
        ;
    *register_at(DATA) = (uint8_t)byte;
}

bool receive_byte(char *byte) {
    enable();
    if (*register_at(FLAGS) & FLAG_NOTHING_RECEIVED)
        return false;
    *byte = (char)*register_at(DATA);
    return true;
}
