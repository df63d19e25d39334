/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The entry point of the freestanding guest. It switches from PVH's 32-bit protected mode with flat
 * segments (struct hvm_start_info in %ebx) to 64-bit mode with the first 4 GiB mapped to
 * themselves, and calls the C code.
 */
#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define STACK_BYTES 65536
#define EXCEPTIONS 32
#define EXCEPTION_STUB_BYTES 16
#define CODE_SELECTOR 8

#define PAGE_PRESENT_WRITABLE 3
#define PAGE_LARGE 0x80
#define LARGE_PAGE_BYTES 0x200000
#define LARGE_PAGES 2048 /* 4 GiB */

#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define CR0_PG_PE 0x80000001

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 8, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start

    .text
    .code32
    .globl _start
_start:
    cli
    cld
    mov $stack_top, %esp

    mov $page_directories + PAGE_PRESENT_WRITABLE, %eax
    mov $page_directory_pointers, %edi
    mov $4, %ecx
point:
    mov %eax, (%edi)
    add $4096, %eax
    add $8, %edi
    loop point

    mov $PAGE_PRESENT_WRITABLE | PAGE_LARGE, %eax
    mov $page_directories, %edi
    mov $LARGE_PAGES, %ecx
map:
    mov %eax, (%edi)
    add $LARGE_PAGE_BYTES, %eax
    add $8, %edi
    loop map

    movl $page_directory_pointers + PAGE_PRESENT_WRITABLE, page_map
    mov $page_map, %eax
    mov %eax, %cr3
    mov $CR4_PAE, %eax
    mov %eax, %cr4
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov $CR0_PG_PE, %eax
    mov %eax, %cr0
    lgdt descriptor_table_pointer
    ljmp $CODE_SELECTOR, $long_mode

    .code64
long_mode:
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %ebx, %edi
    call guest_main
stop:
    hlt
    jmp stop

/* One entry for each exception; the CPU pushes an error code for some of them. */
    .balign EXCEPTION_STUB_BYTES
    .globl exception_stubs
exception_stubs:
    .set vector, 0
    .rept EXCEPTIONS
    .balign EXCEPTION_STUB_BYTES
    mov $vector, %edi
    jmp exception
    .set vector, vector + 1
    .endr
exception:
    mov %cr2, %rsi
    mov (%rsp), %rdx
    mov 8(%rsp), %rcx
    and $-16, %rsp
    call exception_raised

    .data
    .balign 8
descriptor_table:
    .quad 0
    .quad 0x00209a0000000000 /* CODE_SELECTOR: 64-bit code, ring 0 */
descriptor_table_pointer:
    .word . - descriptor_table - 1
    .quad descriptor_table

    .bss
    .balign 4096
    .globl page_map, page_directory_pointers
page_map:
    .skip 4096
page_directory_pointers:
    .skip 4096
page_directories:
    .skip 4 * 4096
    .skip STACK_BYTES
stack_top:
    .section .note.GNU-stack, "", @progbits
