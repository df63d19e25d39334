// SPDX-License-Identifier: Apache-2.0
/*
 * The packed ring (virtio 1.2, section 2.8): one ring of descriptors, which the driver writes in
 * order. The device overwrites them with its answers, in the order in which it finishes requests.
 * The flags AVAIL and USED of a descriptor, compared with a wrap counter that toggles with each
 * round, say which side owns the descriptor. The buffer ID is the request's place.
 *
 * `next` and `seen` are positions: they count descriptors over two rounds of the ring. The wrap
 * counter is 1 in the first of the two, and 0 in the second.
 */
#include "virtqueue.h"

#include <stdatomic.h>

enum {
    DESCRIPTOR_AVAIL = 1 << 7,
    DESCRIPTOR_USED = 1 << 15,

    EVENTS_DISABLED = 1,
    EVENTS_AT_DESCRIPTOR = 2,
    EVENT_WRAP_SHIFT = 15,
};

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t id, flags;
};
// When a side wants to be notified by the other side (section 2.8.10).
struct event {
    uint16_t descriptor, flags;  // bit 15 of `descriptor` is the wrap counter
};

static unsigned wrap_counter(const struct virtqueue *queue, unsigned position) {
    return position < queue->size;
}

static uint16_t advanced(const struct virtqueue *queue, unsigned position, unsigned descriptors) {
    return (uint16_t)((position + descriptors) % (2u * queue->size));
}

static volatile struct descriptor *descriptor_at(const struct virtqueue *queue, unsigned position) {
    volatile struct descriptor *ring = queue->descriptors;
    return &ring[position % queue->size];
}

static void want_no_interrupt(struct virtqueue *queue) {
    volatile struct event *driver_event = queue->driver;
    driver_event->flags = EVENTS_DISABLED;
}

// Section 2.8.7: the device uses the whole table in order, of the flags only WRITE, and no IDs.
static void fill_table(void *table, const struct piece *pieces, unsigned count) {
    struct descriptor *descriptors = table;
    for (unsigned index = 0; index < count; index++)
        descriptors[index] = (struct descriptor){pieces[index].address, pieces[index].length, 0,
                                                 pieces[index].flags};
}

// Whether the device waits for one of the `count` descriptors from position `first` on.
static bool is_awaited(const struct virtqueue *queue, uint16_t first, uint16_t count) {
    const volatile struct event *device_event = queue->device;
    uint16_t flags = device_event->flags;
    atomic_thread_fence(memory_order_acquire);
    uint16_t awaited = device_event->descriptor;
    if (flags != EVENTS_AT_DESCRIPTOR)
        return flags != EVENTS_DISABLED;
    unsigned second_round = awaited >> EVENT_WRAP_SHIFT ? 0 : queue->size;
    unsigned position = (awaited & ((1u << EVENT_WRAP_SHIFT) - 1)) + second_round;
    return advanced(queue, position, 2u * queue->size - first) < count;
}

static bool publish(struct virtqueue *queue, uint16_t place, const struct piece *pieces,
                    uint16_t count) {
    uint16_t first = queue->next;
    for (unsigned index = count; index--;) {  // the first descriptor last: it publishes them all
        uint16_t position = advanced(queue, first, index);
        volatile struct descriptor *descriptor = descriptor_at(queue, position);
        uint16_t owner = wrap_counter(queue, position) ? DESCRIPTOR_AVAIL : DESCRIPTOR_USED;
        descriptor->address = pieces[index].address;
        descriptor->length = pieces[index].length;
        descriptor->id = place;
        atomic_thread_fence(memory_order_release);
        descriptor->flags = pieces[index].flags | owner | (index + 1 < count ? DESCRIPTOR_NEXT : 0);
    }
    queue->next = advanced(queue, first, count);
    atomic_thread_fence(memory_order_seq_cst);  // section 2.8.21.3.1: before reading device_event
    return is_awaited(queue, first, count);
}

static int collect(struct virtqueue *queue) {
    const volatile struct descriptor *answer = descriptor_at(queue, queue->seen);
    uint16_t used = wrap_counter(queue, queue->seen) ? DESCRIPTOR_AVAIL | DESCRIPTOR_USED : 0;
    if ((answer->flags & (DESCRIPTOR_AVAIL | DESCRIPTOR_USED)) != used)
        return -1;
    atomic_thread_fence(memory_order_acquire);
    uint16_t place = answer->id;
    if (place < queue->places)
        queue->seen = advanced(queue, queue->seen, queue->taken[place]);
    return place;
}

const struct ring_form packed_ring = {
    .driver_bytes = sizeof(struct event),
    .device_bytes = sizeof(struct event),
    .want_no_interrupt = want_no_interrupt,
    .fill_table = fill_table,
    .publish = publish,
    .collect = collect,
};
