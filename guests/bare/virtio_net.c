// SPDX-License-Identifier: Apache-2.0
/*
 * A polled virtio network driver (virtio 1.2, section 5.1), for a network that sends every frame
 * back. It carries out reads by an exchange: it stamps pages in its own memory, sends them in frames,
 * and lets the device write what comes back into the requests' pages.
 *
 * The device fills the receive buffers in the order in which it got them. So the driver offers the
 * buffers of an exchange in the order of their frames, and has one exchange at a time. But a frame
 * may get lost, and a foreign frame may take a buffer, so that those behind are shifted. Therefore
 * each frame has a tag, which no other frame has, and each buffer waits for one tag:
 *
 * - If a buffer has received another tag, the device has written to a page what does not belong
 *   there. The pages of that request are no longer write-once pages (repeat_request), and an exchange of
 *   the missing frames follows.
 * - If nothing arrives for some time, the driver sends the frames of the buffers without a frame
 *   again. A buffer takes one frame, so this does not write a page twice.
 *
 * After both, frames without a buffer may be under way. Before the next exchange, the driver takes
 * single frames into a buffer of its own until the one that it sent last has come back. A frame that
 * arrives even later has the wrong tag.
 *
 * A receive buffer has three pieces: the header, in memory that only the device writes; the place in
 * the request's page; and the rest, for a foreign frame of any usual length. Without that rest, the
 * device could write to a page and then drop the frame without a word.
 */
#include "storage.h"

enum {
    NET = 1,
    TRANSITIONAL_NET = 0x1000,
    RECEIVE = 0,  // the numbers of the queues
    TRANSMIT = 1,

    SECTORS = 1 << 24,  // any number: the network stores nothing
    PART_BYTES = 1024,  // of a page, in a frame
    PAGE_PARTS = PAGE_BYTES / PART_BYTES,
    MOST_PAGES = 8,    // at a time; the queue of a tap has room for 500 frames or more
    MOST_FRAMES = MOST_PAGES * PAGE_PARTS,
    FRAME_BYTES = 1526,  // the least size of a receive buffer (section 5.1.6.3.1)

    ETHERTYPE = 0xb688,  // 0x88b6 in network byte order: for local experiments (IEEE 802)
    ECHO_TIMEOUT_US = 20 * 1000,
    POLLS_BETWEEN_CLOCKS = 64,

    NONE = -1,
};

struct header {
    uint8_t virtio[12];  // struct virtio_net_hdr: all zeros, no offload
    uint8_t receiver[6], sender[6];
    uint16_t ethertype, reserved[3];
    uint64_t tag;
};

// What only the device writes.
struct received {
    struct header headers[MOST_FRAMES];
    uint8_t part[PART_BYTES];  // of the frames between the exchanges
    uint8_t rest[FRAME_BYTES - sizeof(struct header) - PART_BYTES];
};
// What only the driver writes.
struct sent {
    struct header headers[MOST_FRAMES];
    uint64_t pages[MOST_PAGES][PAGE_BYTES / 8];
};

static struct virtio_device *network;
static struct virtio_queue queues[2];
static volatile struct received *received;
static struct sent *sent;
static uint64_t received_at, sent_at;  // their addresses for the device

static struct request *requests[MAX_WORKERS];  // of the slots
static uint8_t waiting_slots[MAX_WORKERS];     // a ring, with free-running indices
static uint8_t first_waiting, end_waiting;

static uint32_t next_page;                     // of the first waiting request
static uint32_t unfinished[MAX_WORKERS];       // pages of each slot's request

// The pages of the exchange: the slot of the request, and the page's address for the device.
static struct {
    unsigned slot;
    uint64_t address;
} pages[MOST_PAGES];
static unsigned page_count;

// Each place of the exchange has a receive buffer, and a frame with a part of a page: the first
// PAGE_PARTS places belong to the first page. The sets of places are bit maps.
static uint64_t tags[MOST_FRAMES];
static uint32_t missing;   // parts that the pages do not hold
static uint32_t awaiting;  // buffers without a frame
static uint32_t sending;   // frames that the device may still read
static bool is_disturbed;  // frames without a buffer may be under way
static bool is_flushing;   // place 0 belongs to no request
static bool is_heard;      // a frame has arrived since the last look at the clock

static uint64_t newest_tag, newest_stamp, frames_sent, frames_received;

static void open_queue(unsigned index, unsigned pieces) {
    if (!virtio_open_queue(network, index, &queues[index], MOST_FRAMES, pieces))
        give_up("the network's queues are too small; expected 96 descriptors or more");
}

static void start(void) {
    first_waiting = end_waiting = 0;
    next_page = page_count = 0;
    missing = awaiting = sending = 0;
    is_flushing = false;
    is_disturbed = true;
    virtio_start(network);
}

static uint64_t network_open(struct virtio_device *device, unsigned slots) {
    (void)slots;
    network = device;
    open_queue(RECEIVE, 3);
    open_queue(TRANSMIT, 2);
    received = allocate_aligned((sizeof *received + PAGE_BYTES - 1) & -PAGE_BYTES, PAGE_BYTES);
    sent = allocate_aligned(sizeof *sent, PAGE_BYTES);
    received_at = iommu_map(IOMMU_PERMANENT, (uint64_t)received, sizeof *received);
    sent_at = iommu_map(IOMMU_PERMANENT, (uint64_t)sent, sizeof *sent);
    start();
    return SECTORS;
}

static void network_reset(void) {
    for (unsigned index = 0; index < sizeof queues / sizeof *queues; index++) {
        virtqueue_reset(&queues[index].ring);
        virtio_enable_queue(network, index, &queues[index]);
    }
    start();
}

// Frames -----------------------------------------------------------------------------------------

static uint64_t part_at(unsigned place) {
    if (is_flushing)
        return received_at + offsetof(struct received, part);
    return pages[place / PAGE_PARTS].address + place % PAGE_PARTS * PART_BYTES;
}

static void offer_buffer(unsigned place) {
    struct piece pieces[] = {
        {received_at + place * sizeof(struct header), sizeof(struct header), DESCRIPTOR_WRITE},
        {part_at(place), PART_BYTES, DESCRIPTOR_WRITE},
        {received_at + offsetof(struct received, rest), sizeof received->rest, DESCRIPTOR_WRITE},
    };
    awaiting |= 1u << place;
    virtio_submit(&queues[RECEIVE], RECEIVE, place, pieces, 3);
}

static void send_frame(unsigned place) {
    struct header *header = &sent->headers[place];
    *header = (struct header){
        .receiver = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
        .sender = {0x02},  // an address of local administration
        .ethertype = ETHERTYPE,
        .tag = tags[place],
    };
    struct piece pieces[] = {
        {sent_at + place * sizeof *header, sizeof *header, 0},
        {sent_at + offsetof(struct sent, pages) + place * PART_BYTES, PART_BYTES, 0},
    };
    sending |= 1u << place;
    frames_sent++;
    virtio_submit(&queues[TRANSMIT], TRANSMIT, place, pieces, 2);
}

static void exchange(uint32_t places) {
    for (unsigned place = 0; place < MOST_FRAMES; place++) {
        if (places & 1u << place) {
            tags[place] = ++newest_tag;
            offer_buffer(place);
        }
    }
    for (unsigned place = 0; place < MOST_FRAMES; place++)
        if (places & 1u << place)
            send_frame(place);
    is_heard = true;
}

static void take_frame(unsigned place) {
    const volatile struct header *header = &received->headers[place];
    bool is_own = header->ethertype == ETHERTYPE, is_awaited = header->tag == tags[place];
    awaiting &= ~(1u << place);
    is_heard = true;
    frames_received += is_own;
    if (is_flushing) {
        is_flushing = !(is_own && is_awaited);
    } else if (is_own && is_awaited) {
        missing &= ~(1u << place);
    } else {
        is_disturbed = true;
        repeat_request(requests[pages[place / PAGE_PARTS].slot]);
    }
}

static bool is_silent(void) {
    static unsigned polls;
    static uint64_t silent_since;
    if (++polls % POLLS_BETWEEN_CLOCKS)
        return false;
    uint64_t now = microseconds();
    if (is_heard)
        silent_since = now;
    is_heard = false;
    return now - silent_since > ECHO_TIMEOUT_US;
}

// Send the frames that are awaited again, except those that the device has not sent yet.
static void repeat_frames(void) {
    if (is_flushing && !sending)
        tags[0] = ++newest_tag;  // the old one may arrive before other old frames
    for (unsigned place = 0; place < MOST_FRAMES; place++)
        if (awaiting & ~sending & 1u << place)
            send_frame(place);
    is_disturbed |= !is_flushing;
    is_heard = true;
}

// Requests ---------------------------------------------------------------------------------------

static void network_submit(unsigned slot, struct request *request) {
    if (request->kind != READ || request->piece_bytes != PAGE_BYTES)
        give_up("a network carries whole pages and stores nothing: write_every and "
                "unaligned_every must be 0");
    requests[slot] = request;
    unfinished[slot] = request->count;
    waiting_slots[end_waiting++ % MAX_WORKERS] = (uint8_t)slot;
}

// Choose the pages of the next exchange, of as many requests as possible.
static void choose_pages(void) {
    while (page_count < MOST_PAGES && first_waiting != end_waiting) {
        unsigned slot = waiting_slots[first_waiting % MAX_WORKERS];
        const struct request *request = requests[slot];
        stamp_page(sent->pages[page_count],
                   request->sector + next_page * (PAGE_BYTES / SECTOR_BYTES), ++newest_stamp);
        uint64_t page = (uint64_t)piece_at(request, next_page);
        pages[page_count].slot = slot;
        pages[page_count].address = iommu_map(slot, page, PAGE_BYTES);
        page_count++;
        if (++next_page == request->count) {
            next_page = 0;
            first_waiting++;
        }
    }
    missing = (uint32_t)((1ull << page_count * PAGE_PARTS) - 1);
}

// Remove pages from the exchange, all of whose parts have arrived, until a request is finished.
// Return its slot, or NONE.
static int finish_pages(void) {
    while (page_count) {
        unsigned slot = pages[--page_count].slot;
        if (--unfinished[slot])
            continue;
        iommu_unmap(slot);
        return (int)slot;
    }
    return NONE;
}

// Do the next step, when no buffer is offered. Return a slot whose request is finished, or NONE.
static int advance(void) {
    if (is_flushing) {  // another frame was before the one that was sent last
        offer_buffer(0);
    } else if (is_disturbed) {
        is_disturbed = false;
        is_flushing = true;
        exchange(1);
    } else if (missing) {
        exchange(missing);
    } else {
        int finished = finish_pages();
        if (finished == NONE)
            choose_pages();
        return finished;
    }
    return NONE;
}

static int network_poll(uint8_t *status) {
    int place;
    *status = 0;
    while ((place = virtqueue_poll(&queues[TRANSMIT].ring)) >= 0)
        sending &= ~(1u << place);
    while ((place = virtqueue_poll(&queues[RECEIVE].ring)) >= 0)
        take_frame((unsigned)place);
    if (awaiting && is_silent())
        repeat_frames();
    return awaiting || sending ? NONE : advance();
}

static void network_report(void) {
    report("frames sent=%lu received=%lu", frames_sent, frames_received);
}

const struct storage virtio_net = {
    .type = NET,
    .transitional_id = TRANSITIONAL_NET,
    .open = network_open,
    .reset = network_reset,
    .submit = network_submit,
    .poll = network_poll,
    .report = network_report,
};
