// Chooses the instruction set, once: the best one that the machine has, or the one KVB_CPU_CAPABILITY names.
#include "search.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvb {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

// Intel multiplies bfloat16 vectors at half the speed of float32; AMD at twice.
bool is_amd() {
  return __builtin_cpu_is("amd");
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!(d & bf16) || !(d & tile) || !has_avx512_bf16()) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18; // Linux hands the tile registers out on request
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* choose() {
  const char* wish = std::getenv("KVB_CPU_CAPABILITY");
  const std::string wanted = wish ? wish : "";
  const auto allowed = [&](const char* name) { return wanted.empty() || wanted == name; };
#if defined(__x86_64__)
  if (allowed("amx") && has_amx()) return &amx::kernels;
  if (allowed("avx512_bf16") && has_avx512_bf16() && (is_amd() || !wanted.empty())) return &avx512_bf16::kernels;
  if (allowed("avx512") && has_avx512()) return &avx512::kernels;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernels;
#endif
  if (allowed("portable")) return &portable::kernels;
  return nullptr;
}

} // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  require(chosen, "this machine lacks the instructions that KVB_CPU_CAPABILITY asks for; unset it");
  return *chosen;
}

} // namespace kvb
