/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The probe guest: one vCPU that only dirties the same 64 pages for ever.
 *
 * The guest uses no firmware service, no paging and no interrupts, so nothing flushes the TLB. An
 * accelerator that forgets to reset its dirty state at a bitmap sync certainly loses these pages.
 * QEMU enters the guest by PVH (the note below), in 32-bit protected mode with flat segments. The
 * guest sends "ready" over the second serial port once it has written every page.
 */
#define COM2 0x2f8
#define FIRST_PAGE 0x1000000 /* 16 MiB */
#define PAGES 64
#define PAGE_BYTES 4096
#define XEN_ELFNOTE_PHYS32_ENTRY 18

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start

    .text
    .globl _start
_start:
    cli
    mov $FIRST_PAGE, %esp /* the stack grows down from the pages */
    call increment
    mov $text, %esi
    mov $COM2, %dx
report:
    lodsb
    test %al, %al
    jz run
    outb %al, %dx
    jmp report
run:
    call increment
    jmp run

/* Add one to the first word of every page. */
increment:
    mov $FIRST_PAGE, %edi
    mov $PAGES, %ecx
next:
    incl (%edi)
    add $PAGE_BYTES, %edi
    loop next
    ret

text:
    .asciz "ready\n"
    .section .note.GNU-stack, "", @progbits
