// Storage types of the CPU kernels; arithmetic on them is in vec.h.
#pragma once

#include <cstdint>

namespace ppmoe {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

enum class DType : int { kF32, kBf16, kF16, kF64 };

enum class Activation : int { kGelu, kGeluTanh, kRelu, kSilu, kTanh, kSigmoid, kLeakyRelu };

}  // namespace ppmoe
