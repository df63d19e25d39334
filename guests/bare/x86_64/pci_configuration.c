// SPDX-License-Identifier: Apache-2.0
/* PCI configuration mechanism #1 (PCI Local Bus 3.0, section 3.2.2.3.2). */
#include "../machine.h"
#include "ports.h"

enum {
    CONFIG_ADDRESS = 0xcf8,
    CONFIG_DATA = 0xcfc,
    CONFIG_ENABLE = 1u << 31,
    // Free in QEMU's PCs: inside the PCI hole, below the I/O APIC at 0xfec00000.
    FREE_END = 0xfea00000,
};

static void select(const struct pci_device *device, unsigned offset) {
    out32(CONFIG_ADDRESS, CONFIG_ENABLE | (uint32_t)device->id << 8 | (offset & 0xfc));
}

uint32_t pci_read32(const struct pci_device *device, unsigned offset) {
    select(device, offset);
    return in32(CONFIG_DATA);
}

void pci_write32(const struct pci_device *device, unsigned offset, uint32_t value) {
    select(device, offset);
    out32(CONFIG_DATA, value);
}

uint32_t pci_free_end(void) {
    return FREE_END;
}
