#include "ppmoe/capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ppmoe {
namespace {

#ifdef PPMOE_HAS_AVX512_BF16
constexpr Isa kBestBuilt = Isa::kAvx512Bf16;
#elif defined(PPMOE_HAS_AVX512)
constexpr Isa kBestBuilt = Isa::kAvx512;
#elif defined(PPMOE_HAS_AVX2)
constexpr Isa kBestBuilt = Isa::kAvx2;
#else
constexpr Isa kBestBuilt = Isa::kBaseline;
#endif

Isa select() {
  const Isa best = detected_isa() < kBestBuilt ? detected_isa() : kBestBuilt;
  const char* wish = std::getenv("PPMOE_OPS_CPU_CAPABILITY");
  if (wish == nullptr || *wish == 0) return best;
  std::string allowed;
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
    if (std::strcmp(wish, kIsaNames[isa]) == 0) return static_cast<Isa>(isa);
    allowed += (isa != 0 ? ", " : "") + std::string(kIsaNames[isa]);
  }
  throw std::invalid_argument("PPMOE_OPS_CPU_CAPABILITY is '" + std::string(wish) +
                              "'; allowed here: " + allowed);
}

}  // namespace

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("f16c")) {
    return Isa::kBaseline;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

Isa selected_isa() {
  static const Isa isa = select();
  return isa;
}

}  // namespace ppmoe
