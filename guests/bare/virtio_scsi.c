// SPDX-License-Identifier: Apache-2.0
/*
 * A polled virtio SCSI driver (virtio 1.2, section 5.6), for the disk at target 0, logical unit 0.
 * The slots are distributed over the request queues in turn, and each has a place in its queue. The
 * responses have their own pages, which only the device writes, like its area of a queue.
 */
#include "storage.h"

enum {
    SCSI = 8,
    TRANSITIONAL_SCSI = 0x1004,
    CONTROL = 0,  // the numbers of the queues
    EVENTS = 1,
    FIRST_REQUESTS = 2,
    MAX_QUEUES = 16,  // of requests

    // Section 5.6.4: the sizes that a driver need not set.
    CDB_BYTES = 32,
    SENSE_BYTES = 96,

    // Commands (SBC-4, SPC-5), and the status of one that has sense data.
    TEST_UNIT_READY = 0x00,
    READ_16 = 0x88,
    WRITE_16 = 0x8a,
    SERVICE_ACTION_IN_16 = 0x9e,
    READ_CAPACITY_16 = 0x10,
    CHECK_CONDITION = 0x02,

    MOST_TRIES = 8,  // each takes one reason for a unit attention, such as the reset
};

struct command {
    uint8_t unit[8];
    uint64_t id;
    uint8_t attributes[3], cdb[CDB_BYTES];
} __attribute__((packed));

struct response {
    uint32_t sense_bytes, residual;
    uint16_t qualifier;
    uint8_t status, response, sense[SENSE_BYTES];
};

struct capacity {
    uint8_t last_block[8], block_bytes[4], others[20];  // numbers are big-endian
};

static struct virtio_device *host;
static struct virtio_queue control, events, queues[MAX_QUEUES];
static unsigned queue_count;
static struct command *commands;             // one for each slot
static volatile struct response *responses;  // one for each slot
static struct capacity *capacity;
static uint64_t commands_at, responses_at, capacity_at;  // their addresses for the device

static void put_number(uint8_t *bytes, unsigned count, uint64_t number) {
    while (count--) {
        bytes[count] = (uint8_t)number;
        number >>= 8;
    }
}

static uint64_t number_at(const volatile uint8_t *bytes, unsigned count) {
    uint64_t number = 0;
    for (unsigned index = 0; index < count; index++)
        number = number << 8 | bytes[index];
    return number;
}

static void new_command(unsigned slot, uint8_t operation) {
    commands[slot] = (struct command){
        .unit = {1, 0, 0x40},  // section 5.6.6.1: target 0, and logical unit 0 of flat addressing
        .id = slot,
        .cdb = {operation},
    };
}

static struct piece command_piece(unsigned slot) {
    return (struct piece){commands_at + slot * sizeof *commands, sizeof *commands, 0};
}

static struct piece response_piece(unsigned slot) {
    return (struct piece){responses_at + slot * sizeof *responses, sizeof *responses,
                          DESCRIPTOR_WRITE};
}

// Execute the command in slot 0, which fills `data`, if any, and wait for its status.
static uint8_t execute(const struct piece *data) {
    struct piece pieces[] = {command_piece(0), response_piece(0), data ? *data : (struct piece){0}};
    virtio_submit(&queues[0], FIRST_REQUESTS, 0, pieces, data ? 3 : 2);
    while (virtqueue_poll(&queues[0].ring) < 0)
        ;
    if (responses->response)
        give_up("expected a SCSI disk at target 0, but the host has none");
    return responses->status;
}

static void wait_until_ready(void) {
    for (unsigned tries = 0; tries < MOST_TRIES; tries++) {
        new_command(0, TEST_UNIT_READY);
        if (execute(NULL) != CHECK_CONDITION)
            return;
    }
    give_up("the SCSI disk does not become ready");
}

static uint64_t read_capacity(void) {
    struct piece data = {capacity_at, sizeof *capacity, DESCRIPTOR_WRITE};
    new_command(0, SERVICE_ACTION_IN_16);
    commands[0].cdb[1] = READ_CAPACITY_16;
    put_number(&commands[0].cdb[10], 4, sizeof *capacity);
    if (execute(&data))
        give_up("the SCSI disk does not report its capacity");
    if (number_at(capacity->block_bytes, 4) != SECTOR_BYTES)
        give_up("expected a SCSI disk with blocks of 512 bytes");
    return number_at(capacity->last_block, 8) + 1;
}

static void open_queue(unsigned index, struct virtio_queue *queue, unsigned places,
                       unsigned pieces) {
    if (!virtio_open_queue(host, index, queue, places, pieces))
        give_up("the SCSI host's queues are too small for the workload's threads; use fewer threads");
}

static void reset_queue(unsigned index, struct virtio_queue *queue) {
    virtqueue_reset(&queue->ring);
    virtio_enable_queue(host, index, queue);
}

static uint64_t scsi_open(struct virtio_device *device, unsigned slots) {
    host = device;
    uint32_t offered = *(volatile uint32_t *)host->config;
    queue_count = offered < MAX_QUEUES ? offered : MAX_QUEUES;
    if (queue_count > slots)
        queue_count = slots;
    // A back end may wait until all queues exist. These two remain empty.
    open_queue(CONTROL, &control, 1, 1);
    open_queue(EVENTS, &events, 1, 1);
    for (unsigned index = 0; index < queue_count; index++)
        open_queue(FIRST_REQUESTS + index, &queues[index],
                   (slots - index + queue_count - 1) / queue_count, MAX_PIECES);
    size_t response_bytes = (slots * sizeof *responses + PAGE_BYTES - 1) & -PAGE_BYTES;
    commands = allocate(slots * sizeof *commands);
    responses = allocate_aligned(response_bytes, PAGE_BYTES);
    capacity = allocate(sizeof *capacity);
    commands_at = iommu_map(IOMMU_PERMANENT, (uint64_t)commands, slots * sizeof *commands);
    responses_at = iommu_map(IOMMU_PERMANENT, (uint64_t)responses, response_bytes);
    capacity_at = iommu_map(IOMMU_PERMANENT, (uint64_t)capacity, sizeof *capacity);
    virtio_start(host);
    wait_until_ready();
    return read_capacity();
}

static void scsi_reset(void) {
    reset_queue(CONTROL, &control);
    reset_queue(EVENTS, &events);
    for (unsigned index = 0; index < queue_count; index++)
        reset_queue(FIRST_REQUESTS + index, &queues[index]);
    virtio_start(host);
    wait_until_ready();
}

static void scsi_submit(unsigned slot, struct request *request) {
    struct piece pieces[MAX_PIECES] = {command_piece(slot)};
    unsigned count = 1;
    bool writes = request->kind == WRITE;
    new_command(slot, writes ? WRITE_16 : READ_16);
    put_number(&commands[slot].cdb[2], 8, request->sector);
    put_number(&commands[slot].cdb[10], 4, bytes_of(request) / SECTOR_BYTES);
    if (!writes)  // the response is after all that the device reads, and before what it writes
        pieces[count++] = response_piece(slot);
    count = add_data(slot, request, pieces, count);
    if (writes)
        pieces[count++] = response_piece(slot);
    unsigned index = slot % queue_count;
    virtio_submit(&queues[index], FIRST_REQUESTS + index, slot / queue_count, pieces, count);
}

static int scsi_poll(uint8_t *status) {
    int slot = poll_slots(queues, queue_count);
    if (slot >= 0)
        *status = responses[slot].response ? responses[slot].response : responses[slot].status;
    return slot;
}

const struct storage virtio_scsi = {
    .type = SCSI,
    .transitional_id = TRANSITIONAL_SCSI,
    .open = scsi_open,
    .reset = scsi_reset,
    .submit = scsi_submit,
    .poll = scsi_poll,
};
