// KVB_TARGET("avx2,fma") ... KVB_TARGET_END: functions between the two are compiled for these instructions.
// Headers with inline functions come before it, so that no shared function is compiled for one machine only.
#pragma once

#define KVB_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KVB_TARGET(names) KVB_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define KVB_TARGET_END KVB_PRAGMA(clang attribute pop)
#else
#define KVB_TARGET(names) KVB_PRAGMA(GCC push_options) KVB_PRAGMA(GCC target(names))
#define KVB_TARGET_END KVB_PRAGMA(GCC pop_options)
#endif
