// Chooses the instruction set, once: the best one that the machine has, or the one KVB_CPU_CAPABILITY names.
#include "search.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace kvb {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if (!(d & int8) || !(d & tile)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18; // Linux hands the tile registers out on request
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__)
bool has_dot() {
#if defined(__linux__)
  constexpr unsigned long products_of_bytes = 1ul << 20; // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & products_of_bytes;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
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
  if (allowed("avx512_vnni") && has_avx512_vnni()) return &avx512_vnni::kernels;
  if (allowed("avx512") && has_avx512()) return &avx512::kernels;
  if (allowed("avx_vnni") && has_avx_vnni()) return &avx_vnni::kernels;
  if (allowed("avx2") && has_avx2()) return &avx2::kernels;
#elif defined(__aarch64__)
  if (allowed("neon_dot") && has_dot()) return &neon_dot::kernels;
  if (allowed("neon")) return &neon::kernels;
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
