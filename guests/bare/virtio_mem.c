// SPDX-License-Identifier: Apache-2.0
#include "virtio_mem.h"

#include "virtio_pci.h"

enum {
    MEM = 0x1058,
    REQUEST_PLUG = 0,
    RESPONSE_ACK = 0,
};
static const uint64_t F_UNPLUGGED_INACCESSIBLE = 1ull << 1;

struct configuration {
    uint64_t block_bytes;
    uint16_t node, padding[3];
    uint64_t address, region_bytes, usable_bytes, plugged_bytes, requested_bytes;
};
struct mem_request {
    uint16_t type, padding[3];
    uint64_t address;
    uint16_t blocks, padding_2[3];
};
struct mem_response {
    uint16_t type, padding[3];
    uint64_t state;
};

bool virtio_mem_plug(struct range *range) {
    static const uint16_t ids[] = {MEM};
    static uint32_t next;
    struct virtio_device device = {.pci = {(uint16_t)next}};
    if (next > UINT16_MAX || !virtio_find(&device, ids, 1))
        return false;
    next = device.pci.id + 1u;
    struct virtio_queue *queue = allocate(sizeof *queue);
    virtio_open(&device, F_UNPLUGGED_INACCESSIBLE);
    if (!virtio_open_queue(&device, 0, queue, 1, 2))
        give_up("the queue of a virtio-mem device is too small");
    virtio_start(&device);

    const volatile struct configuration *memory = (volatile void *)device.config;
    *range = (struct range){memory->address, memory->address + memory->requested_bytes};
    struct mem_request *request = allocate(sizeof *request);
    volatile struct mem_response *response = allocate(sizeof *response);
    request->type = REQUEST_PLUG;
    request->address = range->start;
    request->blocks = (uint16_t)(memory->requested_bytes / memory->block_bytes);
    struct piece pieces[] = {
        {(uint64_t)request, sizeof *request, 0},
        {(uint64_t)response, sizeof *response, DESCRIPTOR_WRITE},
    };
    virtio_submit(queue, 0, 0, pieces, 2);
    while (virtqueue_poll(&queue->ring) < 0)
        ;
    if (response->type != RESPONSE_ACK)
        give_up("a virtio-mem device has refused to plug its memory");
    return true;
}
