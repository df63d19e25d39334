// SPDX-License-Identifier: Apache-2.0
/*
 * A network that sends everything back, used instead of a disk. The guest stamps a page, sends it in
 * parts, and reassembles the page from the parts that the device wrote into the kernel's buffers.
 * Each part is an Ethernet frame, or a UDP datagram to a server behind a network that only carries
 * IP. The guest sends parts that do not come back again, because a network may lose them.
 */
#define _GNU_SOURCE
#include "loop.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <netpacket/packet.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init.h"

enum {
    UP_TIMEOUT_US = 10 * 1000 * 1000,
    ECHO_TIMEOUT_US = 20 * 1000,
    PART_BYTES = 1366,        // three parts for a page
    FIRST_PROTOCOL = 0x9100,  // an Ethernet type for each thread
};

// Addresses of TEST-NET-1, which real networks do not use (RFC 5737).
#define OWN_ADDRESS "192.0.2.2"
#define GATEWAY_ADDRESS "192.0.2.1"
#define NETWORK_MASK "255.255.255.0"

struct message {
    uint64_t number;
    uint32_t part;
    uint8_t data[PART_BYTES];
};

enum { PARTS = (PAGE_BYTES + PART_BYTES - 1) / PART_BYTES };

static const char *interface_name;
static in_port_t echo_port;  // in network byte order; 0: the network sends frames back
static atomic_ulong sent, received;

static struct sockaddr_in ip_address(const char *text) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    inet_pton(AF_INET, text, &address.sin_addr);
    return address;
}

static void set_address(int fd, unsigned long request, const char *text) {
    struct ifreq interface = {0};
    struct sockaddr_in address = ip_address(text);
    strncpy(interface.ifr_name, interface_name, sizeof interface.ifr_name - 1);
    memcpy(&interface.ifr_addr, &address, sizeof address);
    if (ioctl(fd, request, &interface) < 0)
        give_up("set the IP address of the network interface", interface_name);
}

static void bring_up(void) {
    int fd = socket(echo_port ? AF_INET : AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq interface = {.ifr_flags = IFF_UP | IFF_PROMISC};
    strncpy(interface.ifr_name, interface_name, sizeof interface.ifr_name - 1);
    for (int waited = 0; ioctl(fd, SIOCSIFFLAGS, &interface) < 0; waited += 1000, usleep(1000))
        if (waited > UP_TIMEOUT_US)
            give_up("bring up the network interface", interface_name);
    if (echo_port) {
        set_address(fd, SIOCSIFADDR, OWN_ADDRESS);
        set_address(fd, SIOCSIFNETMASK, NETWORK_MASK);
    }
    close(fd);
}

void loop_start(const char *interface, const char *port) {
    interface_name = interface;
    echo_port = port ? htons((in_port_t)strtoul(port, NULL, 10)) : 0;
    bring_up();
}

static void connect_to_echo(int fd) {
    struct sockaddr_in address = ip_address(GATEWAY_ADDRESS);
    address.sin_port = echo_port;
    if (fd < 0 || connect(fd, (void *)&address, sizeof address) < 0)
        give_up("open", "a UDP socket");
}

static void bind_to_frames(int fd, uint16_t protocol) {
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET,
        .sll_protocol = protocol,
        .sll_ifindex = (int)if_nametoindex(interface_name),
    };
    if (fd < 0 || bind(fd, (void *)&address, sizeof address) < 0)
        give_up("open", "a packet socket");
}

static uint16_t protocol_of(uintptr_t thread) {
    return htons((uint16_t)(FIRST_PROTOCOL + thread));
}

int loop_open(uintptr_t thread) {
    static const struct timeval timeout = {.tv_usec = ECHO_TIMEOUT_US};
    int fd;
    if (echo_port) {
        fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        connect_to_echo(fd);
    } else {
        fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, protocol_of(thread));
        bind_to_frames(fd, protocol_of(thread));
    }
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0)
        give_up("set the timeout of", "a socket");
    return fd;
}

static size_t part_bytes(uint32_t part) {
    size_t rest = PAGE_BYTES - part * PART_BYTES;
    return rest < PART_BYTES ? rest : PART_BYTES;
}

// Return the address for a socket's messages: everyone's for a frame; a UDP socket is connected.
static socklen_t receiver_of(int fd, struct sockaddr_ll *address) {
    socklen_t length = sizeof *address;
    if (echo_port || getsockname(fd, (void *)address, &length) < 0)
        return 0;
    address->sll_halen = 6;
    memset(address->sll_addr, 0xff, address->sll_halen);
    return sizeof *address;
}

static void send_parts(int fd, const uint8_t *page, uint64_t number, uint32_t parts) {
    struct sockaddr_ll receiver = {0};
    socklen_t length = receiver_of(fd, &receiver);
    for (uint32_t part = 0; part < PARTS; part++) {
        struct message message = {.number = number, .part = part};
        if (!(parts & 1u << part))
            continue;
        memcpy(message.data, page + part * PART_BYTES, part_bytes(part));
        if (sendto(fd, &message, sizeof message, 0, length ? (void *)&receiver : NULL, length) > 0)
            atomic_fetch_add(&sent, 1);
    }
}

// Put the `missing` parts of page `number` into `page`; return those that still do not arrive.
static uint32_t receive_parts(int fd, uint8_t *page, uint64_t number, uint32_t missing) {
    struct message message;
    while (missing && recv(fd, &message, sizeof message, 0) >= (ssize_t)sizeof message) {
        atomic_fetch_add(&received, 1);
        if (message.number != number || message.part >= PARTS)
            continue;  // a late part of an earlier page
        memcpy(page + message.part * PART_BYTES, message.data, part_bytes(message.part));
        missing &= ~(1u << message.part);
    }
    return missing;
}

uint64_t loop_transfer(int fd, const struct request *request) {
    static atomic_ulong pages;
    uint64_t words[PAGE_BYTES / sizeof(uint64_t)];
    for (uint32_t index = 0; index < request->count; index++) {
        uint64_t number = atomic_fetch_add(&pages, 1) + 1;
        uint32_t missing = (1 << PARTS) - 1;
        stamp_page(words, request->sector + index * (PAGE_BYTES / SECTOR_BYTES), number);
        while (missing) {
            send_parts(fd, (void *)words, number, missing);
            missing = receive_parts(fd, piece_at(request, index), number, missing);
        }
    }
    return bytes_of(request);
}

void report_loop(void) {
    report("frames sent=%lu received=%lu", atomic_load(&sent), atomic_load(&received));
}
