// Matrix products as every family's kernels take them, on raw pointers. Strides and sizes are in
// elements.
#pragma once

#include <cstdint>

#include "ppmoe/types.h"

namespace ppmoe {

// How products are cut; kernels and operators must agree.
constexpr int64_t kSlabColumns = 192;  // columns of b that are packed and multiplied together
constexpr int64_t kBlockRows = 384;    // rows of a block: its panels stay in the second-level cache
constexpr int64_t kPanelRows = 12;     // a multiple of every instruction set's panel
constexpr int64_t kThinRows = 16;      // up to so many rows, packing b takes longer than it saves

// Row i lies at row_index[i] * row_stride where there is an index, and columns likewise.
struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;
  const int32_t* row_index = nullptr;
  const int32_t* col_index = nullptr;
};

// c [m, n] = a [m, k] @ b [k, n] + bias[n], for one block of c that one thread owns. `group` is how
// many rows the whole product has: the order of sums depends on it, not on the block.
struct Gemm {
  Matrix a, b;
  void* c;
  int64_t ldc;
  const void* bias;  // [n] of dtype, or null
  DType dtype;
  int64_t m, n, k;
  int64_t group;
  bool stream;  // stores go past the caches
};

}  // namespace ppmoe
