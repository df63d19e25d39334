// SPDX-License-Identifier: Apache-2.0
/*
 * The workload that both guests carry out: it plans requests to the disk, chooses the pages of the
 * buffer, and checks the data. Each guest implements the access to the device, time, memory and
 * threads in its own way.
 *
 * The device stamps every page of the disk (docs/guests.md): the LBA and the request number
 * determine every word of a page. The device increments the request number with each request, so
 * the data of a read must be newer than all data seen before the request. A page that the device
 * wrote and the migration lost holds an older stamp, and the check fails. If the disk is an image
 * file (parameter image), the stamps do not change: then a lost page holds the stamp of another
 * LBA, or none.
 *
 * The buffer has four regions: each worker's own few pages; the hot pages, which are read into
 * again and again; the write-once pages, each of which is read into a single time, after dmaproof
 * has requested that, so that no later write hides a lost dirty bit; and the churn pages, which a
 * vCPU dirties continuously.
 *
 * A guest that runs on the destination before all pages have arrived changes pages there. On
 * dmaproof's command it declares the pages that it may write itself ("own" reports), which cannot be
 * compared then.
 *
 * The hold pages are outside the buffer. Nothing in the guest uses them: dmaproof has QEMU write to
 * them, so that a migration stays in precopy even if the guest is slow.
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
    OWN_PAGES = 4,         // of each worker; the first page number is a multiple of this
    MAX_SMALL_PAGES = 16,  // of a request that is not huge; its pages may be scattered
    HUGE_PAGES = 256,
    REPORT_EVERY_US = 100 * 1000,
    CHURN_EVERY_US = 5 * 1000,
};

// SplitMix64 by Steele, Lea and Flood: the increment of the state, and the output function.
#define SPLITMIX64_STEP UINT64_C(0x9E3779B97F4A7C15)

static inline uint64_t splitmix64_mix(uint64_t value) {
    value = (value ^ value >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ value >> 27) * UINT64_C(0x94D049BB133111EB);
    return value ^ value >> 31;
}

enum pattern { RANDOM, SEQUENTIAL, HOT_SET };

// The parameters of docs/guests.md, with the same names.
struct parameters {
    uint64_t threads, hot, write_once, last, churn, hold, seed;
    uint64_t write_every, max_pages, huge_every, unaligned_every, image, pattern;
};
extern struct parameters parameters;

// A source of requests, one at a time: a thread, or a slot of a queue.
struct worker {
    uint64_t random;
    uint32_t own;  // the first of its own pages
};

// A request for `count` whole pages of the disk. Page number i of the request starts `offset` bytes
// into page pages[i] of the buffer and may extend into the next page. The device transfers it in
// pieces of `piece_bytes`.
struct request {
    enum { READ, WRITE, READ_BACK } kind;
    enum { OWN, HOT, WRITE_ONCE } region;
    uint64_t sector;
    uint32_t count, offset, piece_bytes, block;
    uint64_t newest_before;
    uint32_t pages[HUGE_PAGES];
};

// Functions that a guest implements for the workload ---------------------------------------------

// The address of a page of the buffer; a worker's own pages are adjacent in memory.
uint8_t *page_at(uint64_t page);
uint64_t gpa_of(const void *address);
// Zeroed memory that is never freed.
void *allocate(size_t bytes);
// Memory that keeps its guest-physical addresses, in pieces as large as possible; NULL if the guest
// has no such memory.
uint8_t *allocate_unmoving(size_t bytes);
// Report, with report_own(), all memory that the guest may write itself while churn is quiet.
void report_own_memory(void);
// Send a line to dmaproof; the supported conversions are %s, %lu and %#lx.
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Stop making requests and wait until none is in flight (true), or continue (false).
void pause_requests(bool wanted);
// The number of requests in flight.
uint64_t requests_under_way(void);
// Wait for plugged memory, and move `count` pages of the buffer, from page `first` on, to it, as
// far as they fit. Return the number of moved pages, which lose their content.
uint64_t move_to_new_memory(uint64_t first, uint64_t count);
// Reset the device and initialise it again, with the requests in flight.
void reset_device(void);
// Remove the device's driver and load it again.
void reload_driver(void);
// Reset the machine.
_Noreturn void reset_machine(void);
// The alignment in bytes of a request's pieces.
extern const uint32_t piece_alignment;

// Functions of the workload for a guest ----------------------------------------------------------

// Read "name=value"; return false if the parameter is unknown or its value is invalid.
bool read_parameter(const char *text);
// The number of pages that the buffer must have.
uint64_t buffer_pages(void);
// Prepare the workload, after the parameters have been read and before the functions below. Return
// NULL, or the reason for a failure.
const char *prepare_workload(uint64_t disk_sectors);
struct worker new_worker(uint64_t number);

// Plan the next request; return false if no request is possible at the moment.
bool plan_request(struct worker *worker, struct request *request);
uint32_t pieces_of(const struct request *request);
uint8_t *piece_at(const struct request *request, uint32_t piece);
uint64_t bytes_of(const struct request *request);
// Stamp a page as the device does, for a guest that must generate the data itself.
void stamp_page(uint64_t *words, uint64_t lba, uint64_t number);
// Note that a request is made again, because the device was reset before the request was finished.
void repeat_request(struct request *request);
// Finish a request: `done` is the number of transferred bytes, or an error number.
void finish_request(struct request *request, uint64_t done);

// Check a packet: it must hold the first `count` words of a stamped page with LBA 0 that is newer
// than all packets before. Only one thread may call this.
void check_packet(const uint64_t *words, uint64_t count);

uint64_t requests_finished(void);
// Return the number of the buffer's pages that only the device writes, and the number of the first.
uint64_t device_pages(uint64_t *first);
// Report the pages from guest-physical address `start` to `end` as the guest's own.
void report_own(uint64_t start, uint64_t end);
// Write to every churn page, unless dmaproof has requested quiet.
void churn(void);
// Execute a command of dmaproof.
void obey(char command);
// Report that the guest boots; this must be its first report.
void report_boot(void);
void report_ready(void);
void report_progress(void);

#endif
