/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The probe guest: one vCPU that only dirties the same 64 pages for ever.
 *
 * The guest uses no paging and no interrupts, so nothing flushes the TLB. An accelerator that
 * forgets to reset its dirty state at a bitmap sync certainly loses these pages. OpenSBI enters the
 * guest in supervisor mode. The guest sends "ready" over the PCI serial port once it has written
 * every page; it assigns the port an address first, because no firmware does.
 */
#define PCI_CONFIGURATION 0x30000000 /* of QEMU's virt machine, as is the next address */
#define PCI_PORTS 0x3000000
#define SLOT_SHIFT 15
#define SLOTS 32
#define SERIAL_PORT 0x00021b36 /* device and vendor of QEMU's pci-serial */
#define COMMAND 0x04
#define COMMAND_PORTS 1
#define FIRST_BAR 0x10
#define PORT 0x1000
#define FIRST_PAGE 0x81000000 /* 16 MiB after the start of RAM */
#define PAGES 64
#define PAGE_BYTES 4096

    .text
    .globl _start
_start:
    jal increment
    li t0, PCI_CONFIGURATION
    li t1, SLOTS
    li t2, SERIAL_PORT
find:
    lwu t3, 0(t0)
    beq t3, t2, found
    li t3, 1 << SLOT_SHIFT
    add t0, t0, t3
    addi t1, t1, -1
    bnez t1, find
    j run /* dmaproof reports the missing "ready" */
found:
    li t3, PORT
    sw t3, FIRST_BAR(t0)
    li t3, COMMAND_PORTS
    sh t3, COMMAND(t0)
    la t0, text
    li t1, PCI_PORTS + PORT
report:
    lbu t2, 0(t0)
    beqz t2, run
    sb t2, 0(t1)
    addi t0, t0, 1
    j report
run:
    jal increment
    j run

/* Add one to the first word of every page. */
increment:
    li t4, FIRST_PAGE
    li t5, PAGES
    li t3, PAGE_BYTES
next:
    lw t6, 0(t4)
    addi t6, t6, 1
    sw t6, 0(t4)
    add t4, t4, t3
    addi t5, t5, -1
    bnez t5, next
    ret

text:
    .asciz "ready\n"
    .section .note.GNU-stack, "", @progbits
