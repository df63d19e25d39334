// SPDX-License-Identifier: Apache-2.0
/*
 * The first process of an L1 whose kernel has its drivers as modules. It loads the modules that
 * /modules/order lists, in that order, mounts the shared root file system, and runs its /init.
 *
 * The mount options are those in rootflags=... on the kernel's command line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Noreturn void give_up(const char *what) {
    printf("early_init: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    reboot(RB_AUTOBOOT);  // QEMU exits instead, because of -no-reboot
    for (;;)
        pause();
}

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "r");
    char path[256];
    if (order == NULL)
        give_up("/modules/order");
    while (fscanf(order, "%255s", path) == 1) {
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || syscall(SYS_finit_module, file, "", 0) != 0)
            give_up(path);
        close(file);
    }
    fclose(order);
}

/* Return the value of `rootflags` on the kernel's command line. */
static const char *root_flags(void) {
    static char line[4096];
    if (mount("proc", "/proc", "proc", 0, NULL) != 0)
        give_up("/proc");
    FILE *file = fopen("/proc/cmdline", "r");
    if (file == NULL || fgets(line, sizeof line, file) == NULL)
        give_up("/proc/cmdline");
    fclose(file);
    umount("/proc");
    char *flags = strstr(line, "rootflags=");
    if (flags == NULL) {
        errno = EINVAL;
        give_up("rootflags");
    }
    flags += strlen("rootflags=");
    flags[strcspn(flags, " \n")] = '\0';
    return flags;
}

int main(void) {
    load_modules();
    mkdir("/root", 0755);
    if (mount("root", "/root", "9p", MS_RDONLY, root_flags()) != 0)
        give_up("the root file system");
    if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0)
        give_up("moving to the root file system");
    execl("/init", "/init", (char *)NULL);
    give_up("/init");
}
