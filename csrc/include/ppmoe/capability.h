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
