/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The probe guest: one vCPU that only dirties the same 64 pages for ever.
 *
 * The guest uses no firmware service, no interrupts and, after its start, the same page tables, so
 * nothing flushes the TLB. An accelerator that forgets to reset its dirty state at a bitmap sync
 * certainly loses these pages. The MMU is on because KVM's host reads RAM through its caches, which
 * writes without an MMU bypass. The guest sends "ready" over the PL011 once it has written every
 * page.
 */
#include "../bare/aarch64/mmu.h"

#define PL011 0x9000000
#define PL011_LINE_CONTROL 0x2c
#define PL011_8_BITS_WITH_FIFOS 0x70
#define PL011_CONTROL 0x30
#define PL011_ENABLE_BOTH_WAYS 0x301
#define FIRST_PAGE 0x41000000 /* RAM begins 16 MiB before */
#define PAGES 64
#define PAGE_BYTES 4096

    .text
    .globl _start
_start:
    enable_mmu
    bl increment
    mov x0, #PL011
    mov w1, #PL011_8_BITS_WITH_FIFOS
    str w1, [x0, #PL011_LINE_CONTROL]
    mov w1, #PL011_ENABLE_BOTH_WAYS
    str w1, [x0, #PL011_CONTROL]
    adr x2, text
report:
    ldrb w1, [x2], #1
    cbz w1, run
    str w1, [x0]
    b report
run:
    bl increment
    b run

/* Add one to the first word of every page. */
increment:
    mov x1, #FIRST_PAGE
    mov x2, #PAGES
next:
    ldr w3, [x1]
    add w3, w3, #1
    str w3, [x1]
    add x1, x1, #PAGE_BYTES
    subs x2, x2, #1
    b.ne next
    ret

text:
    .asciz "ready\n"

    page_tables
    .section .note.GNU-stack, "", @progbits
