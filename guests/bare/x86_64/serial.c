// SPDX-License-Identifier: Apache-2.0
/* The serial port to dmaproof: the second one, a 16550A. */
#include "../machine.h"
#include "ports.h"

enum {
    COM2 = 0x2f8,
    LINE_STATUS = COM2 + 5,
    STATUS_RECEIVED = 0x01,
    STATUS_MAY_SEND = 0x20,
};

void send_byte(char byte) {
    while (!(in8(LINE_STATUS) & STATUS_MAY_SEND))
        ;
    out8(COM2, (uint8_t)byte);
}

bool receive_byte(char *byte) {
    if (!(in8(LINE_STATUS) & STATUS_RECEIVED))
        return false;
    *byte = (char)in8(COM2);
    return true;
}
