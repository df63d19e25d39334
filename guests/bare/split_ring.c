// SPDX-License-Identifier: Apache-2.0
/*
 * The split ring (virtio 1.2, section 2.7). Every place has its own `room` descriptors in the
 * table; the first descriptor identifies the request. `next` and `seen` are the free-running
 * indices of the available and the used ring.
 */
#include "virtqueue.h"

#include <stdatomic.h>

enum {
    NO_INTERRUPT = 1,
    NO_NOTIFY = 1,
};

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
struct available {
    uint16_t flags, index, ring[];  // after the ring: used_event
};
struct used {
    uint16_t flags, index;
    struct {
        uint32_t id, length;
    } ring[];  // after the ring: avail_event, the index for which the device wants a kick
};

static void want_no_interrupt(struct virtqueue *queue) {
    volatile struct available *available = queue->driver;
    available->flags = NO_INTERRUPT;
    available->ring[queue->size] = queue->seen + 0x8000;  // an event index far ahead
}

// Write a chain of descriptors to a table, from number `first` on.
static void chain(volatile struct descriptor *table, unsigned first, const struct piece *pieces,
                  unsigned count) {
    for (unsigned index = 0; index < count; index++) {
        bool last = index + 1 == count;
        volatile struct descriptor *descriptor = &table[first + index];
        descriptor->address = pieces[index].address;
        descriptor->length = pieces[index].length;
        descriptor->flags = pieces[index].flags | (last ? 0 : DESCRIPTOR_NEXT);
        descriptor->next = last ? 0 : (uint16_t)(first + index + 1);
    }
}

static void fill_table(void *table, const struct piece *pieces, unsigned count) {
    chain(table, 0, pieces, count);
}

static bool publish(struct virtqueue *queue, uint16_t place, const struct piece *pieces,
                    uint16_t count) {
    volatile struct available *available = queue->driver;
    const volatile struct used *used = queue->device;
    uint16_t head = place * queue->room, index = queue->next++;
    chain(queue->descriptors, head, pieces, count);
    available->ring[index % queue->size] = head;
    atomic_thread_fence(memory_order_release);
    available->index = queue->next;
    atomic_thread_fence(memory_order_seq_cst);  // section 2.7.13.4.1: before reading avail_event
    const volatile uint16_t *kick_wanted_at = (const volatile void *)&used->ring[queue->size];
    return queue->event_index ? *kick_wanted_at == index : !(used->flags & NO_NOTIFY);
}

static int collect(struct virtqueue *queue) {
    const volatile struct used *used = queue->device;
    if (used->index == queue->seen)
        return -1;
    atomic_thread_fence(memory_order_acquire);
    uint32_t head = used->ring[queue->seen++ % queue->size].id;
    want_no_interrupt(queue);
    return (int)(head / queue->room);
}

const struct ring_form split_ring = {
    .driver_bytes = 6,
    .driver_bytes_each = 2,
    .device_bytes = 6,
    .device_bytes_each = 8,
    .want_no_interrupt = want_no_interrupt,
    .fill_table = fill_table,
    .publish = publish,
    .collect = collect,
};
