/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The probe guest: one vCPU that only dirties the same 64 pages for ever.
 *
 * The guest uses no address translation and no interrupts, so nothing flushes the TLB. An
 * accelerator that forgets to reset its dirty state at a bitmap sync certainly loses these pages.
 * QEMU enters the guest in 64-bit mode. The guest sends "ready" over the SCLP's ASCII console once
 * it has written every page.
 */
#define WRITE_EVENT_DATA 0x760005 /* a command of the SCLP (QEMU: include/hw/s390x/sclp.h) */
#define ASCII_CONSOLE_DATA 0x1a
#define FIRST_PAGE 0x1000000 /* 16 MiB */
#define PAGES 64
#define PAGE_BYTES 4096

    .text
    .globl _start
_start:
    brasl %r14, increment
    lgfi %r2, WRITE_EVENT_DATA
    larl %r3, block
    .insn rre, 0xb2200000, %r2, %r3 /* SERVICE CALL, which the assembler has no name for */
run:
    brasl %r14, increment
    j run

/* Add one to the first word of every page. */
increment:
    lgfi %r4, FIRST_PAGE
    lghi %r5, PAGES
next:
    asi 0(%r4), 1
    agfi %r4, PAGE_BYTES
    brctg %r5, next
    br %r14

/* The service call's control block, which must not cross a page. */
    .data
    .balign PAGE_BYTES
block:
    .short end - block
    .byte 0, 0, 0, 0 /* function code and control mask */
    .short 0 /* response code */
event:
    .short end - event
    .byte ASCII_CONSOLE_DATA, 0
    .short 0
    .ascii "ready\n"
end:
    .section .note.GNU-stack, "", @progbits
