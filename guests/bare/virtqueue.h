// SPDX-License-Identifier: Apache-2.0
/*
 * The driver's end of a virtqueue, polled. Its two forms (virtio 1.2, sections 2.7 and 2.8) lay out
 * memory and count in ways of their own, and have a file each: split_ring.c and packed_ring.c. What
 * they share is in virtqueue.c: where the areas are, and what goes into an indirect table.
 *
 * A request is known by its place: a number below the queue's `places`, of which each has one
 * request at a time under way.
 */
#ifndef DMAPROOF_VIRTQUEUE_H
#define DMAPROOF_VIRTQUEUE_H

#include "machine.h"

enum {
    MAX_QUEUE_SIZE = 128,
    MAX_PIECES = MAX_SMALL_PAGES + 2,  // more than these lie in a row
    DESCRIPTOR_BYTES = 16,
    DESCRIPTOR_NEXT = 1,
    DESCRIPTOR_WRITE = 2,
    DESCRIPTOR_INDIRECT = 4,
};

static const uint64_t F_RING_INDIRECT = 1ull << 28;
static const uint64_t F_RING_EVENT_INDEX = 1ull << 29;
static const uint64_t F_RING_PACKED = 1ull << 34;

// What one descriptor is to say; of its flags, WRITE or INDIRECT.
struct piece {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
};

struct virtqueue {
    const struct ring_form *form;
    bool event_index;
    uint16_t size;                // descriptors
    uint16_t places, room;        // requests at a time, and the descriptors that each may take
    uint16_t next, seen;          // of requests and of answers, as the form counts
    uint16_t taken[MAX_WORKERS];  // descriptors of the ring, by each place's request
    // The areas (section 2.6). The device's is on pages of its own, which only the device writes:
    // if it does not report these writes, nothing else hides that.
    volatile void *descriptors, *driver, *device;
    uint8_t (*tables)[MAX_PIECES * DESCRIPTOR_BYTES];  // an indirect one for each place
    uint64_t parts[3], tables_at;  // where the device finds the areas, and the tables
};

struct ring_form {
    // How large the driver's and the device's area are, beside so many bytes for each descriptor.
    size_t driver_bytes, driver_bytes_each, device_bytes, device_bytes_each;
    void (*want_no_interrupt)(struct virtqueue *queue);
    void (*fill_table)(void *table, const struct piece *pieces, unsigned count);
    // Make a request available. Returns whether the device wants to be told.
    bool (*publish)(struct virtqueue *queue, uint16_t place, const struct piece *pieces,
                    uint16_t count);
    // The place whose request came back, or -1 if there is none.
    int (*collect)(struct virtqueue *queue);
};
extern const struct ring_form split_ring, packed_ring;

// Lay out a queue of `size` descriptors for `places` requests at a time, in the form that was
// negotiated. Returns false if it is too small for them.
bool virtqueue_open(struct virtqueue *queue, uint64_t features, uint16_t size, unsigned places);
// Ask for something in a free place. Returns whether the device wants to be told.
bool virtqueue_submit(struct virtqueue *queue, unsigned place, const struct piece *pieces,
                      unsigned count);
// The place whose request is over, or -1 if there is none.
int virtqueue_poll(struct virtqueue *queue);

#endif
