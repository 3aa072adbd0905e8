// What the kernels of ladder_ffn take. The map is worked on in units of up to kFfnUnit pixels; a
// phase goes over all units, in any order and on any threads, before the next one begins.
//
// Between phases, pixels are rows of the packed dtype of gemm.h, FfnBytes::row bytes each and
// filled with zeros to whole vectors. Vectors of channels are wide (float; double for kF64) and
// padded.
#pragma once

#include <cstdint>

#include "cpu/ladder_attention/attention_kernels.h"
#include "ppmoe/types.h"

namespace ppmoe::ladder_attention {

constexpr int64_t kFfnUnit = 48, kFfnLeast = 8;  // pixels

// How many units there are depends on the number of pixels alone; small maps are cut for four
// threads.
constexpr int64_t ffn_units(int64_t pixels) {
  const int64_t whole = (pixels + kFfnUnit - 1) / kFfnUnit;
  const int64_t shared = whole < 8 ? (whole + 3) / 4 * 4 : whole;
  const int64_t most = (pixels + kFfnLeast - 1) / kFfnLeast;
  return shared < most ? shared : most;
}
constexpr int64_t ffn_begin(int64_t pixels, int64_t unit) {
  return pixels * unit / ffn_units(pixels);
}

// The backward sums over groups of units: no more of them than share the work well, as each has a
// sum of its own for every parameter.
constexpr int64_t ffn_groups(int64_t pixels) {
  const int64_t units = ffn_units(pixels);
  const int64_t few = units < 32 ? units / 2 : 16;
  const int64_t groups = few > units / 16 ? few : units / 16;
  return groups > 1 ? groups : 1;
}
constexpr int64_t ffn_group_unit(int64_t pixels, int64_t group) {
  return ffn_units(pixels) * group / ffn_groups(pixels);
}

// Contiguous; null data where the text says so.
struct FfnParameter {
  const void* data = nullptr;
  DType dtype = DType::kF32;
};

struct FfnMatrix {
  const void* data;
  int64_t row, col;  // strides
};

struct FfnBytes {
  int64_t row;       // of a pixel between phases
  int64_t prepared;  // packed weights and vectors
  int64_t backward;  // the same for the backward
  int64_t sums;      // of one vector of channels
  int64_t scratch;   // of a thread
};

// Vectors of channels that each unit leaves in Ffn::sums, and each group in FfnBackward::sums.
constexpr int64_t kFfnStatistics = 2, kFfnGradientSums = 12;

struct Ffn {
  DType dtype;
  int64_t batch, height, width, channels;
  double eps;
  bool training;
  Map x, y;  // the channels of y lie together
  FfnParameter ln_w, ln_b;
  FfnMatrix w1, w2;  // [g, g] of dtype
  FfnParameter b1, dw_w, dw_b, b2;
  // The batch norms' [3, g]; all null where they are folded into the rest.
  FfnParameter bn_w, bn_b;
  void *mean, *var;        // [3, g] wide; results where training
  FfnParameter dw_off;     // [g, 3, 3]: what each tap adds where it is inside the map; or null
  FfnParameter row_scale;  // [B], or null
  char* prepared;
  char* a1;       // [pixels] rows
  char *a2, *h3;  // the same; where training, else null
  char* sums;     // [units, kFfnStatistics] vectors; where training, else null

  int64_t pixels() const { return batch * height * width; }
};

struct FfnResult {
  void* data;
  DType dtype;
};

// The phases of the backward, in order, and what they leave. Each is followed by `backward_settle`.
enum class FfnPhase : int {
  kIn,                // a1, d1
  kConvolve,          // a2, d2, h3
  kProjectBackward,   // u2 in place of h3
  kActivateBackward,  // nothing, or with `apart` h2 in place of u2
  kConvolveBackward,  // u1
  kInBackward,        // grad_x
};

// Rows between the phases: a are activations, d their slopes, h3 what the last norm takes;
// gradients of u1 and u2, the first two norms' results, and of h2, what the second activation
// takes.
struct FfnBackward {
  Ffn forward;  // without y, a1, a2, h3, sums; mean and var are given
  bool training;
  // A group makes h2 of its own pixels and of their neighbours for itself, unless that is too many.
  bool apart;
  Map grad;
  char *a1, *a2, *d1, *d2, *u1, *u2;
  char* sums;               // [groups, kFfnGradientSums] vectors
  char *w1_sums, *w2_sums;  // [groups, g] vectors
  void* grad_x;             // [pixels, g] of dtype
  FfnResult ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b;
};

// Rows of a weight's gradient that are one task.
constexpr int64_t kFfnWeightRows = 32;

struct FfnKernels {
  FfnBytes (*bytes)(DType, int64_t channels);
  // `count` elements, wide for `dtype`.
  void (*widen)(const FfnParameter&, int64_t count, DType dtype, void* to);
  // Packs weights, and folds the batch norms unless they wait for the statistics of training.
  void (*prepare)(const Ffn&);
  // a1 = gelu(w1 LN(x) + b1).
  void (*in)(const Ffn&, int64_t unit, void* scratch);
  // y from a1, with the batch norms as they are.
  void (*out)(const Ffn&, int64_t unit, void* scratch);
  // The same in parts, where training: after `in`, `convolve` and `project` each comes `settle`, of
  // norm 0, 1 and 2, which turns the units' sums into mean and var and folds the norm.
  void (*settle)(const Ffn&, int norm);
  void (*convolve)(const Ffn&, int64_t unit, void* scratch);
  void (*project)(const Ffn&, int64_t unit, void* scratch);
  void (*finish)(const Ffn&, int64_t unit, void* scratch);

  void (*backward_prepare)(const FfnBackward&);
  int64_t (*backward_scratch)(const FfnBackward&);
  void (*backward)(const FfnBackward&, FfnPhase, int64_t group, void* scratch);
  // Adds the groups' sums up, and writes the gradients that they are.
  void (*backward_settle)(const FfnBackward&, FfnPhase);
  // The same for rows first to first + rows of w2's gradient if `second`, else of w1's; at the end.
  void (*weight_gradient)(const FfnBackward&, bool second, int64_t first, int64_t rows);
};

namespace baseline {
extern const FfnKernels kFfnKernels;
}
namespace avx2 {
extern const FfnKernels kFfnKernels;
}
namespace avx512 {
extern const FfnKernels kFfnKernels;
}
namespace avx512_bf16 {
extern const FfnKernels kFfnKernels;
}

}  // namespace ppmoe::ladder_attention
