# From the loader's 32-bit world to `kmain` in 64-bit mode.
#
# QEMU's -kernel finds the PVH note (XEN_ELFNOTE_PHYS32_ENTRY) in the ELF64 image and enters at
# `pvh_start`: 32-bit protected mode, paging off, flat segments, EBX = physical address of the
# start info. There is no stack yet.

.section .note.Xen, "a", @note
.align 4
.long 4, 4, 18
.asciz "Xen"
.long pvh_start

.section .boot, "ax", @progbits
.code32
.globl pvh_start
pvh_start:
    cli
    cld
    mov edi, ebx                    # first argument of kmain; nothing below touches edi

    # One PML4 entry, four PDPT entries, 2048 pages of 2 MiB: the first 4 GiB map to themselves.
    mov eax, offset boot_pdpt
    or eax, 3
    mov [boot_pml4], eax
    mov eax, offset boot_pd
    or eax, 3
    xor ecx, ecx
1:  mov [boot_pdpt + ecx*8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jne 1b
    mov eax, 0x83                   # present, writable, 2 MiB
    xor ecx, ecx
2:  mov [boot_pd + ecx*8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 2b

    mov eax, cr4
    or eax, (1<<5)|(1<<9)|(1<<10)   # PAE; OSFXSR and OSXMMEXCPT: `core` was compiled with SSE2
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080             # EFER: long mode
    rdmsr
    or eax, 1<<8
    wrmsr
    mov eax, cr0
    and eax, ~(1<<2)                # no x87 emulation
    or eax, (1<<31)|(1<<16)|(1<<1)|1 # paging, write protect, monitor coprocessor, protected mode
    mov cr0, eax
    lgdt [boot_gdt_ptr]
    ljmp 8, offset start64

.code64
start64:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov edi, edi                    # the upper half is undefined after the mode switch
    lea rsp, [BOOT_STACK + {stack_bytes}]
    xor ebp, ebp
    call kmain
    ud2

.align 16
boot_gdt:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
boot_gdt_ptr:
    .word boot_gdt_ptr - boot_gdt - 1
    .long boot_gdt

.section .bss.boot, "aw", @nobits
.align 4096
.globl boot_pml4
boot_pml4: .skip 4096
.globl boot_pdpt
boot_pdpt: .skip 4096
.globl boot_pd
boot_pd: .skip 4096*4

.section .text
