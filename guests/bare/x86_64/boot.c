// SPDX-License-Identifier: Apache-2.0
/* PVH boot: the structures of Xen's public/arch-x86/hvm/start_info.h. */
#include "../machine.h"

struct start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, acpi_table, memory_map;
    uint32_t memory_map_entries, reserved;
};
struct memory_map_entry {
    uint64_t start, bytes;
    uint32_t type, reserved;
};
enum { MEMORY_MAP_RAM = 1 };

bool ram_range(const void *start_info, unsigned index, struct range *range) {
    const struct start_info *info = start_info;
    const struct memory_map_entry *entries = (void *)info->memory_map;
    if (info->version < 1 || !info->memory_map_entries)
        give_up("the PVH start info has no memory map");
    for (uint32_t entry = 0; entry < info->memory_map_entries; entry++) {
        *range = (struct range){entries[entry].start, entries[entry].start + entries[entry].bytes};
        if (entries[entry].type == MEMORY_MAP_RAM && !index--)
            return true;
    }
    return false;
}

const char *command_line(const void *start_info) {
    return (const char *)((const struct start_info *)start_info)->command_line;
}
