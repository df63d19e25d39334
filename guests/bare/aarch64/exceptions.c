// SPDX-License-Identifier: Apache-2.0
/*
 * Exceptions: they happen only if a migration has lost memory. The guest reports the exception to
 * dmaproof. Without a handler, the CPU would take exceptions without end.
 */
#include "../machine.h"

extern const uint8_t exception_vectors[];  // start.S

_Noreturn void exception_raised(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far);

void catch_exceptions(void) {
    __asm__ volatile("msr vbar_el1, %0\n\tisb" : : "r"(exception_vectors));
}

// Called by start.S with the syndrome, the address of the instruction and the faulting address.
_Noreturn void exception_raised(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far) {
    report("fatal message=\"exception %lu at %#lx, ESR %#lx, FAR %#lx\"", vector, elr, esr, far);
    stop();
}
