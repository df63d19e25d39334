// SPDX-License-Identifier: Apache-2.0
/* What the device tree says about RAM, with a node for each NUMA node, and the command line. */
#include "../machine.h"
#include "device_tree.h"

bool ram_range(const void *start_info, unsigned index, struct range *range) {
    (void)start_info;  // the place of the device tree is fixed
    struct property memory = device_tree_property("memory@", index, "reg");
    if (!memory.value)
        return false;
    range->start = device_tree_number(memory, 0, 2);
    range->end = range->start + device_tree_number(memory, 2, 2);
    return true;
}

const char *command_line(const void *start_info) {
    (void)start_info;
    const uint8_t *text = device_tree_property("chosen", 0, "bootargs").value;
    return text ? (const char *)text : "";
}
