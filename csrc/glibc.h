// What newer versions of glibc changed, done without: a build made beside any glibc runs on all from 2.28 on, as does
// PyTorch. `make wheels` checks it.
#pragma once

#include <cmath>

#if defined(__GLIBC__) && defined(__x86_64__)
#define KVB_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define KVB_OLDEST_GLIBC "GLIBC_2.17"
#endif

#ifdef KVB_OLDEST_GLIBC
// The same functions under the names that they had before they left errno alone.
__asm__(".symver exp,exp@" KVB_OLDEST_GLIBC);
__asm__(".symver log,log@" KVB_OLDEST_GLIBC);
// Counts of shared pointers ask it whether they may do without atomic operations: never.
extern "C" {
__attribute__((visibility("hidden"), weak)) char __libc_single_threaded = 0;
}
#endif
