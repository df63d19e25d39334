// SPDX-License-Identifier: Apache-2.0
#include "device_tree.h"

#include "../machine.h"

enum {
    // QEMU puts the device tree of an ELF at the start of RAM if the ELF leaves room there
    // (arm_setup_direct_kernel_boot in hw/arm/boot.c).
    TREE = 0x40000000,
    MAGIC = 0xd00dfeed,
    STRUCTURE_OFFSET = 2,  // cells of the header
    STRINGS_OFFSET = 3,
    CELL_BYTES = 4,

    BEGIN_NODE = 1,
    END_NODE = 2,
    PROPERTY = 3,
    END = 9,
    CHILD_OF_ROOT = 2,
};

uint64_t device_tree_number(struct property property, unsigned first, unsigned cells) {
    uint64_t number = 0;
    for (unsigned byte = first * CELL_BYTES; byte < (first + cells) * CELL_BYTES; byte++)
        number = number << 8 | property.value[byte];
    return number;
}

static uint32_t cell_at(const uint8_t *at) {
    return (uint32_t)device_tree_number((struct property){at, CELL_BYTES}, 0, 1);
}

// The number of characters that both texts begin with.
static size_t common_length(const char *text, const char *other) {
    size_t length = 0;
    while (text[length] && text[length] == other[length])
        length++;
    return length;
}

static size_t rounded_up(size_t bytes) {
    return (bytes + CELL_BYTES - 1) & -(size_t)CELL_BYTES;
}

struct property device_tree_property(const char *node, unsigned index, const char *name) {
    const uint8_t *tree = (const uint8_t *)TREE;
    if (cell_at(tree) != MAGIC)
        give_up("no device tree was found at the start of RAM");
    const uint8_t *at = tree + cell_at(tree + STRUCTURE_OFFSET * CELL_BYTES);
    const char *strings = (const char *)tree + cell_at(tree + STRINGS_OFFSET * CELL_BYTES);
    unsigned depth = 0;
    bool in_node = false;
    for (uint32_t token; (token = cell_at(at)) != END;) {
        at += CELL_BYTES;
        if (token == BEGIN_NODE) {
            const char *found = (const char *)at;
            bool matches = ++depth == CHILD_OF_ROOT && !node[common_length(node, found)];
            in_node = matches && !index--;
            while (*at)
                at++;
            at = tree + rounded_up((size_t)(at + 1 - tree));
        } else if (token == END_NODE) {
            depth--;
        } else if (token == PROPERTY) {
            struct property property = {at + 2 * CELL_BYTES, cell_at(at)};
            const char *found = strings + cell_at(at + CELL_BYTES);
            size_t common = common_length(name, found);
            if (in_node && depth == CHILD_OF_ROOT && !name[common] && !found[common])
                return property;
            at = property.value + rounded_up(property.bytes);
        }
    }
    return (struct property){0};
}
