// A fiber: a stack and the registers a function call must preserve. switch_stack() stores those registers on the
// running stack, remembers where, and takes them from another stack, so it returns in the other fiber, at the place
// where that one last called it. No system call, about 10 ns; the C library's swapcontext() does the same with two
// system calls.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

extern "C" void simt_switch_stack(void** save_here, void* go_to);

#if defined(__x86_64__)

// It ends with a jump, not with `ret`: the processor would predict a return to the caller, and always wrongly.
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rdx
    jmp *%rdx
.size simt_switch_stack, . - simt_switch_stack
)");

// A stack from which the first switch enters `start`, which must not return. `top` is the end of the stack's memory.
inline void* new_stack(char* top, void (*start)()) {
    void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--stack = nullptr;  // where a return address would be: entered by a jump, the function expects one
    *--stack = reinterpret_cast<void*>(start);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--stack = nullptr;
    return stack;
}

#elif defined(__aarch64__)

asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, %function
simt_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    br x30
.size simt_switch_stack, . - simt_switch_stack
)");

inline void* new_stack(char* top, void (*start)()) {
    constexpr int kSavedBytes = 160, kReturnAddress = 88;
    char* stack = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - kSavedBytes;
    std::memset(stack, 0, kSavedBytes);
    std::memcpy(stack + kReturnAddress, &start, sizeof start);
    return stack;
}

#else
#error "fiber.h: no context switch for this processor; x86-64 and aarch64 have one"
#endif

}  // namespace simt
