// Chooses the instruction set of gathers and their gradients.
#include "kernels.h"

#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kvb {
namespace {

const TableKernels& choose() {
#if defined(__x86_64__)
  const std::string_view name = kernels().name;
  if (name.starts_with("avx512") || name == "amx") return avx512::table_kernels;
  unsigned a, b, c, d;
  constexpr unsigned f16c = 1u << 29; // conversions of float16, which most processors with AVX2 have, but need not
  if (name.starts_with("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & f16c)) return avx2::table_kernels;
#endif
  return portable::table_kernels;
}

} // namespace

const TableKernels& table_kernels() {
  static const TableKernels& chosen = choose();
  return chosen;
}

} // namespace kvb
