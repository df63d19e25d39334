/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For assembler code: turn the MMU and the caches on, with the first 2 GiB mapped to themselves.
 *
 * Nothing may be written while the MMU is off: under KVM such a write bypasses the caches, and a
 * stale cache line may hide it. Therefore the page tables of the start are part of the image.
 *
 * QEMU's machine `virt` enters an ELF with the MMU off, at EL1, or at EL2 if the machine has
 * `virtualization=on`. The ELF must leave the start of RAM, 0x40000000, to the device tree.
 */
#define CURRENT_EL2 (2 << 2)
#define HCR_EL1_IS_64_BIT (1 << 31)
#define SPSR_EL1_MASKED 0x3c5 /* EL1 with its own stack, all interrupts masked */

/* paging.c uses the same numbers. */
#define MAIR 0xff00 /* memory types 0: device, no gathering or reordering; 1: write-back */
#define BLOCK_DEVICE 0x60000000000401 /* valid, accessed, memory type 0, never executed */
#define BLOCK_NORMAL 0x705 /* valid, accessed, inner shareable, memory type 1 */
#define TABLE 3
#define BLOCK_BYTES 0x40000000

/* 48-bit addresses, pages of 4 KiB, walks through write-back caches, nothing behind TTBR1. */
#define TCR (16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23)
#define TCR_PHYSICAL_SIZE_SHIFT 32
#define PHYSICAL_SIZE_48_BITS 5
#define SCTLR_RESERVED 0x30d00800
#define SCTLR_MMU_AND_CACHES 0x1005

    .macro enable_mmu
    msr daifset, #0xf
    mrs x0, CurrentEL
    cmp x0, #CURRENT_EL2
    b.ne at_el1
    mov x0, #HCR_EL1_IS_64_BIT
    msr hcr_el2, x0
    msr cntvoff_el2, xzr
    mov x0, #SPSR_EL1_MASKED
    msr spsr_el2, x0
    adr x0, at_el1
    msr elr_el2, x0
    eret
at_el1:
    ldr x0, =MAIR
    msr mair_el1, x0
    ldr x0, =TCR
    mrs x1, id_aa64mmfr0_el1
    and x1, x1, #7
    mov x2, #PHYSICAL_SIZE_48_BITS /* the most with these page tables */
    cmp x1, x2
    csel x1, x1, x2, lo
    bfi x0, x1, #TCR_PHYSICAL_SIZE_SHIFT, #3
    msr tcr_el1, x0
    ldr x0, =page_map
    msr ttbr0_el1, x0
    tlbi vmalle1
    ic iallu
    dsb nsh
    isb
    ldr x0, =SCTLR_RESERVED | SCTLR_MMU_AND_CACHES
    msr sctlr_el1, x0
    isb
    .endm

    .macro page_tables
    .data
    .balign 4096
    .globl page_map
page_map:
    .quad low_blocks + TABLE
    .skip 4096 - 8
low_blocks:
    .quad BLOCK_DEVICE
    .quad BLOCK_BYTES + BLOCK_NORMAL
    .skip 4096 - 16
    .endm
