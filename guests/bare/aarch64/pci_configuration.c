// SPDX-License-Identifier: Apache-2.0
/*
 * The PCI host bridge (device tree binding pci-host-ecam-generic): memory-mapped configuration
 * space, whose place depends on the machine's options and the size of RAM.
 */
#include "../machine.h"
#include "device_tree.h"

enum {
    // Cells of an entry of `ranges`: PCI address with its kind, CPU address, size.
    RANGE_CELLS = 7,
    KIND_MASK = 3 << 24,
    KIND_32_BIT = 2 << 24,
    FUNCTION_SHIFT = 12,
};

static volatile uint32_t *configuration(const struct pci_device *device, unsigned offset) {
    static struct range space;
    if (!space.end) {
        struct property place = device_tree_property("pcie@", 0, "reg");
        if (!place.value)
            give_up("the device tree has no PCI host bridge");
        space.start = device_tree_number(place, 0, 2);
        space.end = space.start + device_tree_number(place, 2, 2);
        map_registers(space);
    }
    uint64_t address = space.start + ((uint64_t)device->id << FUNCTION_SHIFT) + (offset & 0xffc);
    return address < space.end ? (volatile uint32_t *)address : NULL;
}

uint32_t pci_read32(const struct pci_device *device, unsigned offset) {
    const volatile uint32_t *word = configuration(device, offset);
    return word ? *word : UINT32_MAX;
}

void pci_write32(const struct pci_device *device, unsigned offset, uint32_t value) {
    volatile uint32_t *word = configuration(device, offset);
    if (word)
        *word = value;
}

uint32_t pci_free_end(void) {
    struct property ranges = device_tree_property("pcie@", 0, "ranges");
    for (unsigned cell = 0; cell * sizeof(uint32_t) < ranges.bytes; cell += RANGE_CELLS)
        if ((device_tree_number(ranges, cell, 1) & KIND_MASK) == KIND_32_BIT)
            return (uint32_t)(device_tree_number(ranges, cell + 3, 2) +
                              device_tree_number(ranges, cell + 5, 2));
    give_up("the PCI host bridge has no range of 32-bit memory");
}
