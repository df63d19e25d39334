// SPDX-License-Identifier: Apache-2.0
/* The recorder of the kernel's vhost devices with a kernel that a test simulates. */
#define syscall simulated_syscall
#include "vhost_recorder/recorder.c"

typedef long kernel_ioctl(int fd, unsigned long request, void *argument);
static kernel_ioctl *kernel;

void set_kernel(kernel_ioctl *simulated) {
    kernel = simulated;
}

long simulated_syscall(long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    int fd = va_arg(arguments, int);
    unsigned long request = va_arg(arguments, unsigned long);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return kernel(fd, request, argument);
}
