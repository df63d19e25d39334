// SPDX-License-Identifier: Apache-2.0
/*
 * The whole user space of a Linux guest that frees memory on command: it fills most of its
 * RAM, goes on writing to a small part, so that a migration does not end, and gives the rest back to
 * the kernel at the byte 'f' on its second serial port.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, FREED_BYTES = 64 << 20, CHURN_BYTES = 8 << 20, CHURN_PAUSE_US = 20000 };

static int line;

static void say(const char *text) {
    if (write(line, text, strlen(text)) < 0)
        _exit(1);
}

static void load_modules(void) {
    char name[128];
    FILE *list = fopen("/modules/order", "r");
    while (list && fgets(name, sizeof name, list)) {
        name[strcspn(name, "\n")] = 0;
        int module = open(name, O_RDONLY | O_CLOEXEC);
        if (syscall(SYS_finit_module, module, "", 0) < 0)
            say("no module\n");
        close(module);
    }
}

static uint8_t *filled(size_t bytes) {
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    for (size_t page = 0; page < bytes; page += PAGE_BYTES)
        memset(memory + page, 1 + page / PAGE_BYTES % 255, PAGE_BYTES);
    return memory;
}

int main(void) {
    struct termios raw;
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    line = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    tcgetattr(line, &raw);
    cfmakeraw(&raw);
    tcsetattr(line, TCSANOW, &raw);
    load_modules();
    uint8_t *freed = filled(FREED_BYTES), *churned = filled(CHURN_BYTES);
    say("ready\n");
    for (uint64_t turn = 0;; turn++) {
        char order;
        for (size_t page = 0; page < CHURN_BYTES; page += PAGE_BYTES)
            *(volatile uint64_t *)(churned + page) = turn;
        if (read(line, &order, 1) == 1 && order == 'f') {
            munmap(freed, FREED_BYTES);
            say("freed\n");
        }
        usleep(CHURN_PAUSE_US);
    }
}
