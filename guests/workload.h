// SPDX-License-Identifier: Apache-2.0
/*
 * The workload that both guests carry out: what to ask of the disk, into which pages, and whether
 * what comes back is right. How a request reaches the device, and what time, memory and threads
 * are, is each guest's own affair.
 *
 * Every page of the disk is stamped by the device (docs/guests.md): a page is known from its LBA
 * and request number, every word of it. Request numbers rise with each request that the device
 * serves, so whatever a read brings must be newer than anything seen when it was asked for. A page
 * that the device wrote and the migration lost holds an older stamp, and cannot pass. The disk may
 * also be an image file (parameter image), with stamps that stay as they are: then a page that was
 * lost holds another LBA's, or none.
 *
 * The buffer has four regions: a few pages of each worker's own; the hot pages, which are read into
 * again and again; the write-once pages, each of which is read into a single time, after the tool has
 * asked for it, so that a dirty bit that is lost there is never made good by a later write; and the
 * churn pages, which a vCPU keeps dirtying beside the device.
 *
 * Beside the buffer are the hold pages. Nothing in the guest uses them: the tool has QEMU write to
 * them, so that a migration stays in precopy however slow the guest is.
 */
#ifndef DMAPROOF_WORKLOAD_H
#define DMAPROOF_WORKLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PAGE_BYTES = 4096,
    SECTOR_BYTES = 512,
    MAX_WORKERS = 64,
    OWN_PAGES = 4,         // of each worker, from a page number that is a multiple of this on
    MAX_SMALL_PAGES = 16,  // of a request that is not huge, and may be scattered
    HUGE_PAGES = 256,
    REPORT_EVERY_US = 100 * 1000,
    CHURN_EVERY_US = 5 * 1000,
};

// SplitMix64 by Steele, Lea and Flood: what each number adds to the state, and what is made of it.
#define SPLITMIX64_STEP UINT64_C(0x9E3779B97F4A7C15)

static inline uint64_t splitmix64_mix(uint64_t value) {
    value = (value ^ value >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ value >> 27) * UINT64_C(0x94D049BB133111EB);
    return value ^ value >> 31;
}

enum pattern { RANDOM, SEQUENTIAL, HOT_SET };

// The parameters of docs/guests.md, by the names that they have there.
struct parameters {
    uint64_t threads, hot, write_once, last, churn, hold, seed;
    uint64_t write_every, max_pages, huge_every, unaligned_every, image, pattern;
};
extern struct parameters parameters;

// Whoever makes requests, one at a time: a thread, or a slot of a queue.
struct worker {
    uint64_t random;
    uint32_t own;  // the first of its own pages
};

// `count` whole pages of the disk. Page number i of it starts `offset` bytes into page pages[i] of
// the buffer and may run on into the next; it is moved in pieces of `piece_bytes`.
struct request {
    enum { READ, WRITE, READ_BACK } kind;
    enum { OWN, HOT, ONCE } region;
    uint64_t sector;
    uint32_t count, offset, piece_bytes, block;
    uint64_t newest_before;
    uint32_t pages[HUGE_PAGES];
};

// What a guest offers to the workload -------------------------------------------------------------

// The address of a page of the buffer; a worker's own pages follow each other in memory.
uint8_t *page_at(uint64_t page);
uint64_t gpa_of(const void *address);
// Zeroed memory that is never given back.
void *allocate(size_t bytes);
// Memory that keeps its guest-physical addresses, in pieces as large as they can be; NULL if the
// guest has no such memory.
uint8_t *allocate_unmoving(size_t bytes);
// Send a line to the tool; of conversions, %s, %lu and %#lx are known.
void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Stop making requests and wait until none is under way; or go on.
void pause_requests(bool wanted);
// How many requests are under way.
uint64_t requests_under_way(void);
// Wait for memory to be plugged, and let `count` pages of the buffer, from page `first` on, lie in
// plugged memory, as many as there is room for. Returns how many; what they held is gone.
uint64_t move_to_new_memory(uint64_t first, uint64_t count);
// At which multiples in bytes a request's pieces may begin.
extern const uint32_t piece_alignment;

// What the workload offers to a guest -------------------------------------------------------------

// Take "name=value"; false if there is no such parameter, or its value is not understood.
bool read_parameter(const char *text);
// The pages that the buffer must have.
uint64_t buffer_pages(void);
// Once the parameters are read, and before anything below. NULL, or why it cannot be done.
const char *prepare_workload(uint64_t disk_sectors);
struct worker new_worker(uint64_t number);

// What to ask for next; false if there is nothing to be done at the moment.
bool plan_request(struct worker *worker, struct request *request);
uint32_t pieces_of(const struct request *request);
uint8_t *piece_at(const struct request *request, uint32_t piece);
uint64_t bytes_of(const struct request *request);
// Stamp a page, as the device would; for a guest that has to make up what is to come back.
void stamp_page(uint64_t *words, uint64_t lba, uint64_t number);
// The request is over: `done` bytes were moved, or it is an error number.
void finish_request(struct request *request, uint64_t done);

// Check what a packet brought: the first `count` words of a stamped page whose LBA is 0, newer than
// any before. One thread may do so.
void check_packet(const uint64_t *words, uint64_t count);

uint64_t requests_finished(void);
// Write to every churn page, unless the tool wants quiet.
void churn(void);
// Do what a byte of the tool's asks for.
void obey(char command);
void tell_ready(void);
void tell_progress(void);

#endif
