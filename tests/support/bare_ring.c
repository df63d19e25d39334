// SPDX-License-Identifier: Apache-2.0
/* The bare guest's virtqueues for tests, over memory that they share with a device of the test's. */
#include "../../guests/bare/virtqueue.h"

#include <setjmp.h>

static uint8_t *free_memory;
static jmp_buf gave_up;

void *allocate_aligned(size_t bytes, size_t alignment) {
    void *start = (void *)(((uint64_t)free_memory + alignment - 1) & -alignment);
    free_memory = (uint8_t *)start + bytes;
    return start;
}

void *allocate(size_t bytes) {
    return allocate_aligned(bytes, 64);
}

_Noreturn void give_up(const char *why) {
    (void)why;
    longjmp(gave_up, 1);
}

// There is no IOMMU.
uint64_t iommu_map(unsigned window, uint64_t address, uint64_t bytes) {
    (void)window;
    (void)bytes;
    return address;
}

// A queue in `memory`, which is all zeros; NULL if it is too small.
struct virtqueue *ring_open(void *memory, uint64_t features, uint16_t size, unsigned places) {
    free_memory = memory;
    struct virtqueue *queue = allocate(sizeof *queue);
    return virtqueue_open(queue, features, size, places, MAX_PIECES) ? queue : NULL;
}

void ring_areas(const struct virtqueue *queue, uint64_t areas[3]) {
    for (unsigned part = 0; part < 3; part++)
        areas[part] = queue->parts[part];
}

// As virtqueue_poll; -2 where it gives up.
int ring_poll(struct virtqueue *queue) {
    return setjmp(gave_up) ? -2 : virtqueue_poll(queue);
}
