/* SPDX-License-Identifier: Apache-2.0 */
/* The entry point of the freestanding guest. It turns the MMU on, and calls the C code. */
#include "mmu.h"

#define STACK_BYTES 65536

    .text
    .globl _start
_start:
    enable_mmu
    ldr x0, =stack_top
    mov sp, x0
    bl guest_main
stop:
    wfi
    b stop

/* 16 entries of 128 bytes (Arm ARM, section D1.3.1.5). */
    .balign 2048
    .globl exception_vectors
exception_vectors:
    .set vector, 0
    .rept 16
    .balign 128
    mov x0, #vector
    mrs x1, esr_el1
    mrs x2, elr_el1
    mrs x3, far_el1
    b exception_raised
    .set vector, vector + 1
    .endr

    page_tables

    .bss
    .balign 16
    .skip STACK_BYTES
stack_top:
    .section .note.GNU-stack, "", @progbits
