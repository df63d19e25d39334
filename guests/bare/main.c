// SPDX-License-Identifier: Apache-2.0
/*
 * The freestanding guest: it carries out the workload (workload.h) on a virtio device
 * (storage.c), without a kernel, on one CPU that polls everything. A slot corresponds to a thread of
 * the Linux guest. Churn, commands and reports run between polls.
 */
#include "machine.h"

enum {
    COMMAND_LINE_BYTES = 1024,
    POLLS_BETWEEN_CLOCKS = 64,  // the ports of the clock and the serial line are slow
};

const uint32_t piece_alignment = 8;

void guest_main(const void *start_info);

static struct {
    struct worker worker;
    struct request request;
    bool busy;
} slots[MAX_WORKERS];

static unsigned in_flight;
static bool paused;

// Read a parameter "memory=START-END" with decimal addresses.
static bool read_memory(const char *text) {
    uint64_t numbers[2] = {0};
    unsigned index = 0;
    for (const char *name = "memory="; *name; name++)
        if (*text++ != *name)
            return false;
    for (; *text; text++) {
        if (*text >= '0' && *text <= '9')
            numbers[index] = numbers[index] * 10 + (uint64_t)(*text - '0');
        else if (*text != '-' || index++)
            return false;
    }
    expect_memory((struct range){numbers[0], numbers[1]});
    return numbers[0] < numbers[1];
}

// Read the parameters from the command line.
static void read_parameters(const char *text) {
    static char line[COMMAND_LINE_BYTES];
    size_t length = 0;
    for (;; text++) {
        if (*text == ' ' || *text == '\0') {
            line[length] = '\0';
            if (length && !read_memory(line) && !read_parameter(line)) {
                report("fatal message=\"the parameter %s is unknown or invalid\"", line);
                stop();
            }
            length = 0;
        } else if (length < sizeof line - 1) {
            line[length++] = *text;
        }
        if (*text == '\0')
            return;
    }
}

static void finish_requests(void) {
    uint8_t status;
    int number;
    while ((number = storage_poll(&status)) >= 0) {
        if (!slots[number].busy)  // happens if the migration has lost the used ring
            give_up("the device has finished a request that was not in flight");
        struct request *request = &slots[number].request;
        finish_request(request, status ? status : bytes_of(request));
        slots[number].busy = false;
        in_flight--;
    }
}

static void start_requests(void) {
    for (unsigned number = 0; number < parameters.threads && !paused; number++) {
        if (!slots[number].busy && plan_request(&slots[number].worker, &slots[number].request)) {
            slots[number].busy = true;
            in_flight++;
            storage_submit(number, &slots[number].request);
        }
    }
}

uint64_t requests_under_way(void) {
    return in_flight;
}

static bool due(uint64_t *next, uint64_t every_us) {
    uint64_t now = microseconds();
    if (now < *next)
        return false;
    *next = now + every_us;
    return true;
}

static void report_status(void) {
    static uint64_t next;
    if (!due(&next, REPORT_EVERY_US))
        return;
    report_progress();
    storage_report();
}

void report_own_memory(void) {
    struct range own = own_memory();
    report_own(own.start, own.end);
    // The first pages of the buffer, into which the workers put the data that the device reads.
    uint64_t first;
    device_pages(&first);
    for (uint64_t page = 0; page < first; page++)
        report_own(gpa_of(page_at(page)), gpa_of(page_at(page)) + PAGE_BYTES);
}

void pause_requests(bool wanted) {
    paused = wanted;
    while (paused && in_flight) {
        finish_requests();
        report_status();
    }
}

// Use the device again after it was reset, and repeat the requests that were in flight.
static void repeat_requests(void) {
    for (unsigned number = 0; number < parameters.threads; number++) {
        if (!slots[number].busy)
            continue;
        iommu_unmap(number);
        repeat_request(&slots[number].request);
        storage_submit(number, &slots[number].request);
    }
}

void reset_device(void) {
    storage_reset();
    repeat_requests();
}

void reload_driver(void) {
    storage_open((unsigned)parameters.threads);
    repeat_requests();
}

void guest_main(const void *start_info) {
    uint64_t next_churn = 0;
    bool ready = false;
    catch_exceptions();
    report_boot();
    start_clock();
    find_memory(start_info);
    read_parameters(command_line(start_info));
    uint64_t sectors = storage_open((unsigned)parameters.threads);
    const char *problem = prepare_workload(sectors);
    if (problem)
        give_up(problem);
    lay_out_buffer(buffer_pages());
    for (unsigned number = 0; number < parameters.threads; number++)
        slots[number].worker = new_worker(number);
    for (unsigned polls = 0;; polls++) {
        start_requests();
        finish_requests();
        if (!ready && requests_finished()) {
            report_ready();
            ready = true;
        }
        if (polls % POLLS_BETWEEN_CLOCKS)
            continue;
        listen();
        if (due(&next_churn, CHURN_EVERY_US))
            churn();
        report_status();
    }
}
