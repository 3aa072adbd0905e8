// Which instruction set the CPU kernels run with: chosen once, at the first call.
#pragma once

namespace ppmoe {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline constexpr int kIsaCount = 4;
inline constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The best instruction set of this CPU.
Isa detected_isa();

// The one in use: the best that is built and that the CPU has, or a lesser one that
// PPMOE_OPS_CPU_CAPABILITY names. Throws std::invalid_argument where that names anything else.
Isa selected_isa();

}  // namespace ppmoe

// A family's kernel tables, worst first; an instruction set that is not built stands for another.
#ifdef PPMOE_HAS_AVX2
#define PPMOE_TABLE_AVX2 &avx2::kKernels
#else
#define PPMOE_TABLE_AVX2 &baseline::kKernels
#endif
#ifdef PPMOE_HAS_AVX512
#define PPMOE_TABLE_AVX512 &avx512::kKernels
#else
#define PPMOE_TABLE_AVX512 &baseline::kKernels
#endif
#ifdef PPMOE_HAS_AVX512_BF16
#define PPMOE_TABLE_AVX512_BF16 &avx512_bf16::kKernels
#else
#define PPMOE_TABLE_AVX512_BF16 &baseline::kKernels
#endif
#define PPMOE_KERNEL_TABLES \
  {&baseline::kKernels, PPMOE_TABLE_AVX2, PPMOE_TABLE_AVX512, PPMOE_TABLE_AVX512_BF16}
