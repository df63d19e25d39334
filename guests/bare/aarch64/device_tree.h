// SPDX-License-Identifier: Apache-2.0
/* The flattened device tree (Devicetree Specification 0.4, chapter 5). */
#ifndef DMAPROOF_DEVICE_TREE_H
#define DMAPROOF_DEVICE_TREE_H

#include <stdint.h>

// A property's value; its numbers consist of big-endian cells of 32 bits.
struct property {
    const uint8_t *value;
    uint32_t bytes;
};

// Find the property `name` of child number `index` of the root among those whose name begins with
// `node`. Its value is NULL if there is none.
struct property device_tree_property(const char *node, unsigned index, const char *name);
// The number in `cells` cells (1 or 2) of a value, from cell `first` on.
uint64_t device_tree_number(struct property property, unsigned first, unsigned cells);

#endif
