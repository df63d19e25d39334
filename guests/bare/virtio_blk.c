// SPDX-License-Identifier: Apache-2.0
/*
 * A polled virtio block driver (virtio 1.2, section 5.2). The slots are distributed over the queues
 * in turn, and each has a place in its queue. The status bytes have their own page, which only the
 * device writes, like its area of a queue.
 */
#include "storage.h"

enum {
    BLK = 2,
    TRANSITIONAL_BLK = 0x1001,
    CONFIG_QUEUES = 34,
    F_BLK_MQ = 1 << 12,
    MAX_QUEUES = 16,

    REQUEST_IN = 0,
    REQUEST_OUT = 1,
};

struct header {
    uint32_t type, reserved;
    uint64_t sector;
};

static struct virtio_device *disk;
static struct virtio_queue queues[MAX_QUEUES];
static unsigned queue_count;
static struct header *headers;      // one for each slot
static volatile uint8_t *statuses;  // one for each slot
static uint64_t headers_at, statuses_at;  // their addresses for the device

static uint64_t disk_open(struct virtio_device *device, unsigned slots) {
    disk = device;
    queue_count = 1;
    if (disk->features & F_BLK_MQ)
        queue_count = *(volatile uint16_t *)(disk->config + CONFIG_QUEUES);
    if (queue_count > MAX_QUEUES)
        queue_count = MAX_QUEUES;
    if (queue_count > slots)
        queue_count = slots;
    for (unsigned index = 0; index < queue_count; index++) {
        unsigned places = (slots - index + queue_count - 1) / queue_count;
        if (!virtio_open_queue(disk, index, &queues[index], places, MAX_PIECES))
            give_up("the disk's queues are too small for the workload's threads; use fewer threads");
    }
    headers = allocate(slots * sizeof *headers);
    statuses = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    headers_at = iommu_map(IOMMU_PERMANENT, (uint64_t)headers, slots * sizeof *headers);
    statuses_at = iommu_map(IOMMU_PERMANENT, (uint64_t)statuses, PAGE_BYTES);
    virtio_start(disk);
    return *(volatile uint64_t *)disk->config;
}

static void disk_reset(void) {
    for (unsigned index = 0; index < queue_count; index++) {
        virtqueue_reset(&queues[index].ring);
        virtio_enable_queue(disk, index, &queues[index]);
    }
    virtio_start(disk);
}

// Requests ---------------------------------------------------------------------------------------

static void disk_submit(unsigned slot, struct request *request) {
    struct piece pieces[MAX_PIECES] = {
        {headers_at + slot * sizeof *headers, sizeof *headers, 0},
    };
    headers[slot].type = request->kind == WRITE ? REQUEST_OUT : REQUEST_IN;
    headers[slot].sector = request->sector;
    unsigned count = add_data(slot, request, pieces, 1), index = slot % queue_count;
    pieces[count++] = (struct piece){statuses_at + slot, 1, DESCRIPTOR_WRITE};
    virtio_submit(&queues[index], index, slot / queue_count, pieces, count);
}

static int disk_poll(uint8_t *status) {
    int slot = poll_slots(queues, queue_count);
    if (slot >= 0)
        *status = statuses[slot];
    return slot;
}

const struct storage virtio_blk = {
    .type = BLK,
    .transitional_id = TRANSITIONAL_BLK,
    .features = F_BLK_MQ,
    .open = disk_open,
    .reset = disk_reset,
    .submit = disk_submit,
    .poll = disk_poll,
};
