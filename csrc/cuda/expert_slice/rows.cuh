// What the row kernels of expert slicing share: launch shapes and argument checks.
#pragma once

#include <algorithm>
#include <climits>

#include "ppmoe/launch.h"
#include "ppmoe/vector.cuh"

namespace ppmoe {

inline constexpr int kRowThreads = 256;
inline constexpr int kMaxGridY = 65535;

// A slot that is not valid acts as -1 and never reaches an address.
__device__ __forceinline__ bool valid(int slot, int count) {
  return static_cast<unsigned>(slot) < static_cast<unsigned>(count);
}

// A block of kRowThreads threads, as wide as a row of `units` loads asks for, and blocks over rows
// and columns; `rows_each` rows per thread.
struct RowShape {
  dim3 grid;
  dim3 block;

  RowShape(int64_t rows, int64_t units, int rows_each) {
    unsigned wide = 32;
    while (wide < kRowThreads && wide < units) wide *= 2;
    block = dim3(wide, kRowThreads / wide);
    const int64_t tall = static_cast<int64_t>(block.y) * rows_each;
    grid = dim3(static_cast<unsigned>((rows + tall - 1) / tall),
                static_cast<unsigned>(std::min<int64_t>((units + wide - 1) / wide, kMaxGridY)));
  }
};

inline void check_slots_argument(const char* op, const Tensor& slots, const Tensor& like,
                                 int64_t expected, const char* why) {
  check_dim(op, "slots", slots, "T*K");
  check_dtype(op, "slots", slots, {ScalarType::Int});
  check_size(op, "slots", "T*K", slots.size(0), expected, why);
  check_between(op, "T*K", slots.numel(), 0, INT_MAX, "slots are int32");
  check_device(op, "slots", slots, like);
}

}  // namespace ppmoe
