# One stub per vector, 16 bytes apart, so that the table of addresses is a multiplication. A stub
# makes every frame look alike (vector, error code) and the common tail saves what Rust may clobber:
# the general registers and, as compiled code uses SSE anywhere, the x87/SSE state.

.section .text.vectors, "ax", @progbits
.globl interrupt_stubs
.balign 16
interrupt_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0                          # the processor pushes no error code for this one
    .endif
    .byte 0x68                      # push imm32
    .long vector
    jmp interrupt_common
    .set vector, vector + 1
.endr

interrupt_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    # The processor aligned the stack to 16 before it pushed 5 words; 2 + 15 more keep it so.
    mov rdi, rsp
    sub rsp, 512
    fxsave64 [rsp]
    call interrupt_entry
    fxrstor64 [rsp]
    add rsp, 512
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq

.section .text
