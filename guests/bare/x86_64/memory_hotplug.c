// SPDX-License-Identifier: Apache-2.0
/* Plugged memory: the registers that ACPI uses too (QEMU's docs/specs/acpi_mem_hotplug). */
#include "../machine.h"
#include "ports.h"

enum {
    SLOT = 0xa00,  // write: select a slot for all registers; read: its address, in two halves
    SLOT_BYTES = 0xa08,
    SLOT_FLAGS = 0xa14,
    SLOT_ENABLED = 1,
};

static uint64_t read_halves(uint16_t port) {
    uint32_t low = in32(port);
    return (uint64_t)in32((uint16_t)(port + 4)) << 32 | low;
}

bool plugged_range(struct range *range) {
    static uint32_t slots_used;
    out32(SLOT, slots_used);
    if (!(in8(SLOT_FLAGS) & SLOT_ENABLED) || in8(SLOT_FLAGS) == UINT8_MAX)
        return false;
    slots_used++;
    range->start = read_halves(SLOT);
    range->end = range->start + read_halves(SLOT_BYTES);
    return true;
}
