// SPDX-License-Identifier: Apache-2.0
/*
 * The network beside the disk: requests packets from the device's generator, a few at a time, and
 * checks each packet. Other packets, such as announcements after a migration, have another
 * EtherType and are ignored.
 */
#define _GNU_SOURCE
#include "network.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/if_ether.h>
#include <netpacket/packet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../workload.h"

enum {
    ETHERTYPE = 0x88b5,
    STAMP_WORDS = 187,  // of a page's 512, in a frame of the usual size
    BURST = 16,
    BURST_EVERY_US = 4000,
    TIMEOUT_US = 100 * 1000,
};

static int line = -1;
static atomic_ulong packets;

struct frame {
    struct ether_header header;
    uint8_t payload[ETH_DATA_LEN];
} __attribute__((packed));

static void ask_for_packets(void) {
    struct frame frame = {.header.ether_type = htons(ETHERTYPE)};
    uint32_t count = htole32(BURST);
    memset(frame.header.ether_dhost, 0xff, ETH_ALEN);
    memcpy(frame.payload, &count, sizeof count);
    send(line, &frame, sizeof frame.header + sizeof count, 0);
}

static void *exchange(void *argument) {
    struct frame frame;
    uint64_t words[STAMP_WORDS];
    for (;; usleep(BURST_EVERY_US)) {
        ask_for_packets();
        for (int received = 0; received < BURST; received++) {
            ssize_t bytes = recv(line, &frame, sizeof frame, 0);
            if (bytes < 0)
                break;  // a network may lose packets
            bool is_whole = bytes >= (ssize_t)(sizeof frame.header + sizeof words);
            memcpy(words, frame.payload, sizeof words);
            check_packet(words, is_whole ? STAMP_WORDS : 0);
            atomic_fetch_add(&packets, 1);
        }
    }
    return argument;
}

bool start_network(const char *name) {
    struct ifreq interface = {0};
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETHERTYPE),
        .sll_ifindex = (int)if_nametoindex(name),
    };
    struct timeval timeout = {.tv_usec = TIMEOUT_US};
    pthread_t thread;
    strncpy(interface.ifr_name, name, IFNAMSIZ - 1);
    line = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETHERTYPE));
    if (!address.sll_ifindex || line < 0 || ioctl(line, SIOCGIFFLAGS, &interface) < 0)
        return false;
    interface.ifr_flags |= IFF_UP;
    if (ioctl(line, SIOCSIFFLAGS, &interface) < 0 ||
        bind(line, (struct sockaddr *)&address, sizeof address) < 0 ||
        setsockopt(line, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0)
        return false;
    errno = pthread_create(&thread, NULL, exchange, NULL);
    return errno == 0;
}

void report_network(void) {
    if (line >= 0)
        report("network packets=%lu", atomic_load(&packets));
}
