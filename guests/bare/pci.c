// SPDX-License-Identifier: Apache-2.0
/*
 * PCI devices. SeaBIOS assigns the addresses of the BARs. Another firmware (qboot) does not, so this
 * guest assigns them.
 */
#include "machine.h"

enum {
    DEVICES = 1 << 16,  // bus, device and function

    ID = 0x00,
    COMMAND = 0x04,
    COMMAND_MEMORY = 1 << 1,
    COMMAND_BUS_MASTER = 1 << 2,
    STATUS_HAS_CAPABILITIES = 1 << 20,  // in the upper half of COMMAND's word
    BAR0 = 0x10,
    BAR_IS_IO = 1 << 0,
    BAR_IS_64_BIT = 1 << 2,
    CAPABILITIES = 0x34,
};

uint8_t pci_read8(const struct pci_device *device, unsigned offset) {
    return (uint8_t)(pci_read32(device, offset) >> offset % 4 * 8);
}

bool pci_find(uint16_t vendor, const uint16_t *ids, unsigned count, struct pci_device *device) {
    for (uint32_t number = 0; number < DEVICES; number++) {
        device->id = (uint16_t)number;
        uint32_t id = pci_read32(device, ID);
        for (unsigned index = 0; index < count; index++)
            if (id == ((uint32_t)ids[index] << 16 | vendor))
                return true;
        if (id == UINT32_MAX && number % 8 == 0)
            number += 7;  // a device without function 0 does not exist
    }
    return false;
}

unsigned pci_capability(const struct pci_device *device, uint8_t id, unsigned after) {
    if (!(pci_read32(device, COMMAND) & STATUS_HAS_CAPABILITIES))
        return 0;
    unsigned offset = pci_read8(device, after ? after + 1 : CAPABILITIES) & 0xfc;
    while (offset && pci_read8(device, offset) != id)
        offset = pci_read8(device, offset + 1) & 0xfc;
    return offset;
}

// The size of a BAR, from the address bits that can be set (PCI Local Bus 3.0, section 6.2.5.1).
static uint32_t bar_bytes(const struct pci_device *device, unsigned offset) {
    uint32_t value = pci_read32(device, offset);
    pci_write32(device, offset, UINT32_MAX);
    uint32_t bytes = -(pci_read32(device, offset) & ~0xfu);
    pci_write32(device, offset, value);
    return bytes;
}

volatile uint8_t *pci_map_bar(const struct pci_device *device, unsigned bar) {
    static uint32_t free_end;
    unsigned offset = BAR0 + 4 * bar;
    uint32_t value = pci_read32(device, offset);
    if (value & BAR_IS_IO)
        give_up("expected a memory BAR of the device, but it has an I/O BAR");
    uint64_t address = value & ~0xfu;
    uint32_t bytes = bar_bytes(device, offset);
    if (value & BAR_IS_64_BIT)
        address |= (uint64_t)pci_read32(device, offset + 4) << 32;
    if (!address) {
        if (!free_end)
            free_end = pci_free_end();
        free_end = (free_end - bytes) & -bytes;
        address = free_end;
        pci_write32(device, offset, (uint32_t)address);
    }
    map_registers((struct range){address, address + bytes});
    return (volatile uint8_t *)address;
}

void pci_enable(const struct pci_device *device) {
    uint32_t command = pci_read32(device, COMMAND) & 0xffff;
    pci_write32(device, COMMAND, command | COMMAND_MEMORY | COMMAND_BUS_MASTER);
}
