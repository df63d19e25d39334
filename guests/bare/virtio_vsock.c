// SPDX-License-Identifier: Apache-2.0
/*
 * A polled virtio socket driver (virtio 1.2, section 5.10), for a program on the host that sends
 * every byte of a connection back. It carries out reads page by page: it stamps a page in its own
 * memory, sends it, and lets the device write what comes back into the request's page.
 *
 * The device fills the receive buffers in the order in which it got them, and a packet without data,
 * such as one that grants credit, takes a buffer too. With several buffers, the data behind it would
 * get to wrong pages. So the driver offers a single buffer, for the page under way, and offers it
 * again after a packet without data. Such a packet does not change the page.
 *
 * A migration ends the connection: the device then has another CID, and puts an event into the
 * event queue (section 5.10.6.6). The driver connects again, and sends the page under way again. The
 * offered buffer stays with the device, which has not written to it.
 *
 * The host may still have packets of an earlier connection, after a reset of the device. Each
 * connection has another port of the guest. Data for another port belongs to no page: the page that
 * it was written to is no longer a write-once page (repeat_request).
 */
#include "storage.h"

enum {
    VSOCK = 19,
    RECEIVE = 0,  // the numbers of the queues
    TRANSMIT = 1,
    EVENT = 2,
    QUEUES = 3,

    SECTORS = 1 << 24,  // any number: the host stores nothing
    HOST_CID = 2,
    HOST_PORT = 4000,  // the same number is in qmp_tools/devices/vsock_echo.py
    FIRST_PORT = 1024,
    CREDIT_BYTES = 64 * PAGE_BYTES,  // more than is ever under way

    STREAM = 1,

    NONE = -1,
};

enum operation { REQUEST = 1, RESPONSE = 2, RESET = 3, SHUTDOWN = 4, DATA = 5 };

struct __attribute__((packed)) header {
    uint64_t source_cid, target_cid;
    uint32_t source_port, target_port, bytes;
    uint16_t type, operation;
    uint32_t flags, credit_bytes, taken_bytes;
};

// What only the device writes.
struct received {
    struct header header;
    uint32_t event;
};
// What only the driver writes.
struct sent {
    struct header header;
    uint64_t page[PAGE_BYTES / 8];
};

static struct virtio_device *vsock;
static struct virtio_queue queues[QUEUES];
static volatile struct received *received;
static struct sent *sent;
static uint64_t received_at, sent_at;  // their addresses for the device

static struct request *requests[MAX_WORKERS];  // of the slots
static uint8_t waiting_slots[MAX_WORKERS];     // a ring, with free-running indices
static uint8_t first_waiting, end_waiting;

static enum { CLOSED, CONNECTING, OPEN } connection;
static uint32_t port = FIRST_PORT;  // of the connection
static uint32_t taken_bytes;        // on this connection
static bool is_sending;             // the device may still read what was sent

// The page under way: page number `page` of the first waiting request.
static uint32_t page;
static uint64_t page_address;  // for the device; 0: none is under way
static bool is_offered;        // the device may write to it
static bool is_sent;           // its content was sent on this connection

static uint64_t newest_stamp;

static void offer_event_buffer(void) {
    struct piece piece = {received_at + offsetof(struct received, event), sizeof received->event,
                          DESCRIPTOR_WRITE};
    virtio_submit(&queues[EVENT], EVENT, 0, &piece, 1);
}

static void close_connection(void) {
    connection = CLOSED;
    is_sent = false;
}

static void start(void) {
    first_waiting = end_waiting = 0;
    page = 0;
    page_address = 0;
    is_offered = is_sending = false;
    close_connection();
    virtio_start(vsock);
    offer_event_buffer();
}

static uint64_t vsock_open(struct virtio_device *device, unsigned slots) {
    (void)slots;
    vsock = device;
    for (unsigned index = 0; index < QUEUES; index++)
        if (!virtio_open_queue(vsock, index, &queues[index], 1, 2))
            give_up("the socket device's queues are too small; expected 2 descriptors or more");
    received = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    sent = allocate_aligned(sizeof *sent, PAGE_BYTES);
    received_at = iommu_map(IOMMU_PERMANENT, (uint64_t)received, sizeof *received);
    sent_at = iommu_map(IOMMU_PERMANENT, (uint64_t)sent, sizeof *sent);
    start();
    return SECTORS;
}

static void vsock_reset(void) {
    for (unsigned index = 0; index < QUEUES; index++) {
        virtqueue_reset(&queues[index].ring);
        virtio_enable_queue(vsock, index, &queues[index]);
    }
    start();
}

// Packets ----------------------------------------------------------------------------------------

// The CID may change whenever the connection ends.
static uint64_t own_cid(void) {
    return *(volatile uint64_t *)vsock->config;
}

static void send_packet(enum operation operation, uint32_t bytes) {
    sent->header = (struct header){
        .source_cid = own_cid(),
        .target_cid = HOST_CID,
        .source_port = port,
        .target_port = HOST_PORT,
        .bytes = bytes,
        .type = STREAM,
        .operation = (uint16_t)operation,
        .credit_bytes = CREDIT_BYTES,
        .taken_bytes = taken_bytes,
    };
    struct piece pieces[] = {
        {sent_at, sizeof(struct header), 0},
        {sent_at + offsetof(struct sent, page), bytes, 0},
    };
    is_sending = true;
    virtio_submit(&queues[TRANSMIT], TRANSMIT, 0, pieces, bytes ? 2 : 1);
}

static void connect(void) {
    port++;
    taken_bytes = 0;
    connection = CONNECTING;
    send_packet(REQUEST, 0);
}

static struct request *first_request(void) {
    return requests[waiting_slots[first_waiting % MAX_WORKERS]];
}

static void send_page(void) {
    uint64_t lba = first_request()->sector + page * (PAGE_BYTES / SECTOR_BYTES);
    stamp_page(sent->page, lba, ++newest_stamp);
    is_sent = true;
    send_packet(DATA, PAGE_BYTES);
}

static void offer_buffer(void) {
    struct piece pieces[] = {
        {received_at, sizeof(struct header), DESCRIPTOR_WRITE},
        {page_address, PAGE_BYTES, DESCRIPTOR_WRITE},
    };
    is_offered = true;
    virtio_submit(&queues[RECEIVE], RECEIVE, 0, pieces, 2);
}

// Take the packet that the device has written. Return whether the page under way is complete.
static bool take_packet(void) {
    const volatile struct header *header = &received->header;
    bool is_own = header->source_cid == HOST_CID && header->target_port == port;
    is_offered = false;
    if (header->operation == DATA) {
        if (is_own && is_sent && header->bytes == PAGE_BYTES) {
            taken_bytes += PAGE_BYTES;
            return true;
        }
        repeat_request(first_request());
        if (is_own)
            close_connection();
    } else if (is_own && header->operation == RESPONSE && connection == CONNECTING) {
        connection = OPEN;
    } else if (is_own && (header->operation == RESET || header->operation == SHUTDOWN)) {
        close_connection();
    }
    return false;
}

// Requests ---------------------------------------------------------------------------------------

static void vsock_submit(unsigned slot, struct request *request) {
    if (request->kind != READ || request->piece_bytes != PAGE_BYTES)
        give_up("a socket carries whole pages and stores nothing: write_every and "
                "unaligned_every must be 0");
    requests[slot] = request;
    waiting_slots[end_waiting++ % MAX_WORKERS] = (uint8_t)slot;
}

// Go on to the next page. Return the slot of the request if it is finished, or NONE.
static int finish_page(void) {
    page_address = 0;
    is_sent = false;
    if (++page < first_request()->count)
        return NONE;
    page = 0;
    unsigned slot = waiting_slots[first_waiting++ % MAX_WORKERS];
    iommu_unmap(slot);
    return (int)slot;
}

// Do the next step for the first waiting request.
static void advance(void) {
    if (!page_address) {
        uint64_t place = (uint64_t)piece_at(first_request(), page);
        page_address = iommu_map(waiting_slots[first_waiting % MAX_WORKERS], place, PAGE_BYTES);
    }
    if (!is_offered)
        offer_buffer();
    if (is_sending)
        return;
    if (connection == CLOSED)
        connect();
    else if (connection == OPEN && !is_sent)
        send_page();
}

static int vsock_poll(uint8_t *status) {
    *status = 0;
    if (virtqueue_poll(&queues[TRANSMIT].ring) >= 0)
        is_sending = false;
    if (virtqueue_poll(&queues[RECEIVE].ring) >= 0 && take_packet())
        return finish_page();
    if (virtqueue_poll(&queues[EVENT].ring) >= 0) {  // a packet before it is of the old connection
        close_connection();
        offer_event_buffer();
    }
    if (first_waiting != end_waiting)
        advance();
    return NONE;
}

const struct storage virtio_vsock = {
    .type = VSOCK,
    .open = vsock_open,
    .reset = vsock_reset,
    .submit = vsock_submit,
    .poll = vsock_poll,
};
