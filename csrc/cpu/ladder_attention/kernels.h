// The kernels of ladder attention, one table for each instruction set.
#pragma once

#include "cpu/ladder_attention/attention_kernels.h"
#include "cpu/ladder_attention/ffn_kernels.h"
#include "cpu/ladder_attention/fusion_kernels.h"
#include "ppmoe/product.h"

namespace ppmoe::ladder_attention {

struct Kernels {
  AttentionKernels attention;
  const FfnKernels& ffn;
  const FusionKernels& fusion;
  int64_t (*gemm_scratch)(const Gemm&);
  void (*gemm)(const Gemm&, void* scratch);
  // Sums over the rows, times weights [m] where these are not null.
  void (*column_sums)(const Matrix&, const void* weights, DType, int64_t m, int64_t n, void* out);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace ppmoe::ladder_attention
