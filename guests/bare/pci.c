// SPDX-License-Identifier: Apache-2.0
/*
 * PCI devices. SeaBIOS numbers the buses and assigns the addresses of the BARs. Another firmware
 * (qboot) does not, and aarch64 has no firmware, so this guest does it. Only the bridges above a
 * device that the guest uses pass memory accesses on. There must be one such device behind a bridge.
 */
#include "machine.h"

enum {
    FUNCTIONS_OF_BUS = 256,
    BUSES = 256,

    ID = 0x00,
    COMMAND = 0x04,
    COMMAND_MEMORY = 1 << 1,
    COMMAND_BUS_MASTER = 1 << 2,
    STATUS_HAS_CAPABILITIES = 1 << 20,  // in the upper half of COMMAND's word
    BAR0 = 0x10,
    BAR_IS_IO = 1 << 0,
    BAR_IS_64_BIT = 1 << 2,
    CAPABILITIES = 0x34,

    // Registers of a bridge (PCI-to-PCI Bridge 1.2, section 3.2).
    HEADER_TYPE = 0x0e,
    HEADER_TYPE_MASK = 0x7f,
    BRIDGE = 1,
    BUS_NUMBERS = 0x18,  // primary, secondary, subordinate
    BUSES_BELOW_UNKNOWN = 0xff,
    MEMORY_WINDOW = 0x20,  // bits 31 to 20 of its first and of its last address
    WINDOW_GRANULE = 1 << 20,

    // Registers of a port with a slot (PCI Express 4.0, section 7.5.3).
    EXPRESS_CAPABILITY = 0x10,
    SLOT_CONTROL = 0x18,  // the upper half is the status, whose bits are cleared by writing 1
    SLOT_IS_OFF = 1 << 10,
};

// Addresses for BARs: those below `free_end` are free, and those from `window_end` on belong to the
// devices that are enabled.
static uint32_t free_end, window_end;

uint8_t pci_read8(const struct pci_device *device, unsigned offset) {
    return (uint8_t)(pci_read32(device, offset) >> offset % 4 * 8);
}

static bool is_bridge(const struct pci_device *device) {
    return pci_read32(device, ID) != UINT32_MAX &&
           (pci_read8(device, HEADER_TYPE) & HEADER_TYPE_MASK) == BRIDGE;
}

static unsigned secondary_bus(const struct pci_device *bridge) {
    return pci_read8(bridge, BUS_NUMBERS + 1);
}

static unsigned subordinate_bus(const struct pci_device *bridge) {
    return pci_read8(bridge, BUS_NUMBERS + 2);
}

// Number the buses below `bus` that have no number, from `last` + 1 on. Return the last number.
static unsigned number_buses(unsigned bus, unsigned last) {
    for (unsigned function = 0; function < FUNCTIONS_OF_BUS; function++) {
        struct pci_device bridge = {(uint16_t)(bus * FUNCTIONS_OF_BUS + function)};
        if (!is_bridge(&bridge))
            continue;
        if (secondary_bus(&bridge)) {  // the firmware has numbered the buses
            last = subordinate_bus(&bridge);
            continue;
        }
        unsigned below = last + 1;
        pci_write32(&bridge, BUS_NUMBERS, BUSES_BELOW_UNKNOWN << 16 | below << 8 | bus);
        last = number_buses(below, below);
        pci_write32(&bridge, BUS_NUMBERS, last << 16 | below << 8 | bus);
    }
    return last;
}

unsigned pci_capability(const struct pci_device *device, uint8_t id, unsigned after) {
    if (!(pci_read32(device, COMMAND) & STATUS_HAS_CAPABILITIES))
        return 0;
    unsigned offset = pci_read8(device, after ? after + 1 : CAPABILITIES) & 0xfc;
    while (offset && pci_read8(device, offset) != id)
        offset = pci_read8(device, offset + 1) & 0xfc;
    return offset;
}

// A device that was plugged into a slot without power does not answer.
static void switch_slot_on(const struct pci_device *port) {
    unsigned express = pci_capability(port, EXPRESS_CAPABILITY, 0);
    uint32_t control = express ? pci_read32(port, express + SLOT_CONTROL) & 0xffff : 0;
    if (control & SLOT_IS_OFF)
        pci_write32(port, express + SLOT_CONTROL, control & ~SLOT_IS_OFF);
}

bool pci_find(uint16_t vendor, const uint16_t *ids, unsigned count, struct pci_device *device) {
    static bool numbered;
    if (!numbered)
        number_buses(0, 0);
    numbered = true;
    for (uint32_t number = device->id; number < BUSES * FUNCTIONS_OF_BUS; number++) {
        device->id = (uint16_t)number;
        uint32_t id = pci_read32(device, ID);
        for (unsigned index = 0; index < count; index++)
            if (id == ((uint32_t)ids[index] << 16 | vendor))
                return true;
        if (id == UINT32_MAX && number % 8 == 0)
            number += 7;  // a device without function 0 does not exist
        else if (is_bridge(device))
            switch_slot_on(device);
    }
    return false;
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
            free_end = window_end = pci_free_end() & -WINDOW_GRANULE;
        free_end = (free_end - bytes) & -bytes;
        address = free_end;
        pci_write32(device, offset, (uint32_t)address);
    }
    map_registers((struct range){address, address + bytes});
    return (volatile uint8_t *)address;
}

static void enable(const struct pci_device *device) {
    uint32_t command = pci_read32(device, COMMAND) & 0xffff;
    pci_write32(device, COMMAND, command | COMMAND_MEMORY | COMMAND_BUS_MASTER);
}

// Let a bridge that the firmware has not enabled pass on accesses to the BARs from `free_end` on.
static void open_bridge(const struct pci_device *bridge) {
    if (pci_read32(bridge, COMMAND) & COMMAND_MEMORY)
        return;
    pci_write32(bridge, MEMORY_WINDOW, (window_end - WINDOW_GRANULE) | free_end >> 16);
    enable(bridge);
}

void pci_enable(const struct pci_device *device) {
    unsigned bus = device->id / FUNCTIONS_OF_BUS;
    free_end &= -WINDOW_GRANULE;
    for (struct pci_device other = {0}; other.id < bus * FUNCTIONS_OF_BUS; other.id++)
        if (is_bridge(&other) && secondary_bus(&other) <= bus && bus <= subordinate_bus(&other))
            open_bridge(&other);
    window_end = free_end;
    enable(device);
}
