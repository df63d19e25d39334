// SPDX-License-Identifier: Apache-2.0
/*
 * The driver's side of a virtqueue, polled. The two forms of a virtqueue (virtio 1.2, sections 2.7
 * and 2.8) differ in their memory layout and their counters, and have a file each: split_ring.c and
 * packed_ring.c. The common part is in virtqueue.c: the allocation of the areas, and the indirect
 * tables.
 *
 * A request is identified by its place, a number below the queue's `places`. Each place has at most
 * one request in flight.
 */
#ifndef DMAPROOF_VIRTQUEUE_H
#define DMAPROOF_VIRTQUEUE_H

#include "machine.h"

enum {
    MAX_QUEUE_SIZE = 128,
    MAX_PIECES = MAX_SMALL_PAGES + 2,  // the pages of larger requests are adjacent
    DESCRIPTOR_BYTES = 16,
    DESCRIPTOR_NEXT = 1,
    DESCRIPTOR_WRITE = 2,
    DESCRIPTOR_INDIRECT = 4,
};

static const uint64_t F_RING_INDIRECT = 1ull << 28;
static const uint64_t F_RING_EVENT_INDEX = 1ull << 29;
static const uint64_t F_RING_PACKED = 1ull << 34;
static const uint64_t F_ACCESS_PLATFORM = 1ull << 33;  // the device is behind the IOMMU, if any

// The content of one descriptor; `flags` is WRITE, INDIRECT or 0.
struct piece {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
};

struct virtqueue {
    const struct ring_form *form;
    bool event_index;
    uint16_t size;                // descriptors
    uint16_t places, room;        // requests at a time, and the most descriptors of each
    uint16_t next, seen;          // counters of requests and of answers, in the form's own way
    uint16_t taken[MAX_WORKERS];  // the number of ring descriptors of each place's request
    // The areas (section 2.6). The device's area has its own pages, which only the device writes,
    // so that no other write hides a missing report of the device.
    volatile void *descriptors, *driver, *device;
    uint8_t (*tables)[MAX_PIECES * DESCRIPTOR_BYTES];  // an indirect table for each place
    uint64_t parts[3], tables_at;  // the addresses of the areas and the tables for the device
};

struct ring_form {
    // The sizes of the driver's and the device's area: fixed bytes, and bytes for each descriptor.
    size_t driver_bytes, driver_bytes_each, device_bytes, device_bytes_each;
    void (*want_no_interrupt)(struct virtqueue *queue);
    void (*fill_table)(void *table, const struct piece *pieces, unsigned count);
    // Make a request available. Return whether the device wants a notification.
    bool (*publish)(struct virtqueue *queue, uint16_t place, const struct piece *pieces,
                    uint16_t count);
    // Return a place whose request the device has finished, or -1.
    int (*collect)(struct virtqueue *queue);
};
extern const struct ring_form split_ring, packed_ring;

// Set up a queue of `size` descriptors, in the negotiated form, for `places` requests at a time of at
// most `pieces` each. Return false if the queue is too small.
bool virtqueue_open(struct virtqueue *queue, uint64_t features, uint16_t size, unsigned places,
                    unsigned pieces);
// Empty a queue whose device was reset, and let it begin again in the same memory.
void virtqueue_reset(struct virtqueue *queue);
// Submit a request in a free place. Return whether the device wants a notification.
bool virtqueue_submit(struct virtqueue *queue, unsigned place, const struct piece *pieces,
                      unsigned count);
// Return a place whose request is finished, or -1.
int virtqueue_poll(struct virtqueue *queue);

#endif
