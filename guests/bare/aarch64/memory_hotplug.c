// SPDX-License-Identifier: Apache-2.0
/* Plugged memory. QEMU's machine `virt` takes DIMMs only with UEFI firmware (virt_memory_pre_plug). */
#include "../machine.h"
#include "../virtio_mem.h"

bool plugged_range(struct range *range) {
    return virtio_mem_plug(range);
}
