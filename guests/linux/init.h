// SPDX-License-Identifier: Apache-2.0
#ifndef DMAPROOF_INIT_H
#define DMAPROOF_INIT_H

// Report that the guest cannot carry out `action` on `object`, with the reason in errno; power off.
_Noreturn void give_up(const char *action, const char *object);

#endif
