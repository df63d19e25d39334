// SPDX-License-Identifier: Apache-2.0
/*
 * The features that Linux's virtio drivers have accepted. For each device the kernel lists them as
 * a string of the digits 0 and 1, from bit 0 on (features_show in drivers/virtio/virtio.c).
 */
#define _GNU_SOURCE
#include "virtio_features.h"

#include <glob.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "../workload.h"

enum { MOST_FEATURES = 64 };

static bool read_word(const char *device, const char *file, const char *format, char *word) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", device, file);
    FILE *opened = fopen(path, "r");
    if (!opened)
        return false;
    bool read = fscanf(opened, format, word) == 1;
    fclose(opened);
    return read;
}

void report_virtio_features(void) {
    glob_t devices = {0};
    glob("/sys/bus/virtio/devices/virtio*", 0, NULL, &devices);
    for (size_t index = 0; index < devices.gl_pathc; index++) {
        char type[16], bits[MOST_FEATURES + 1];
        uint64_t features = 0;
        if (!read_word(devices.gl_pathv[index], "device", "0x%15s", type) ||
            !read_word(devices.gl_pathv[index], "features", "%64[01]", bits))
            continue;
        for (unsigned bit = 0; bits[bit]; bit++)
            features |= (uint64_t)(bits[bit] == '1') << bit;
        report("virtio-%s features=%lu", type, features);
    }
    globfree(&devices);
}
