// What the kernels of pixel_adaptive_fusion take: raw pointers, strides and sizes in elements.
#pragma once

#include <cstdint>

#include "ppmoe/product.h"
#include "ppmoe/types.h"

namespace ppmoe::ladder_attention {

// A block of rows is at most so many: they stay in the caches from the first product to the last.
constexpr int64_t kFusionRows = 48;

// The layer's parameters as they came. Biases are closed.
struct FusionLayer {
  DType dtype;
  int64_t channels, width;
  Matrix w1, w2, wp;         // [D, C], [C, D], [C, C]
  const void *b1, *b2, *bp;  // bp may be null: its place is then left alone
  bool backward;             // the turned matrices too
};

// Rows of x to rows of out. Channels lie together.
struct Fusion {
  DType dtype;
  int64_t channels, width;
  const void* weights;  // as `fusion_pack` leaves them
  const void* x;
  int64_t x_row;
  void* out;
  int64_t out_row;
};

// Rows of x and of the gradient of out to rows of the gradient of x, and of what the gradients of
// the weights are products of. The latter lie `fusion_pitch` apart.
struct FusionBackward {
  DType dtype;
  int64_t channels, width;
  const void* weights;
  const void *x, *grad;
  int64_t x_row, grad_row;
  void* grad_x;
  int64_t grad_x_row;
  void *hidden, *grad_hidden;  // [rows, D]
  void *gated, *grad_gate;     // [rows, C]: t, and the gradient of what the gate is taken of
};

// out [outputs, inputs] = left^T @ right: a block of a weight's gradient.
struct FusionGradient {
  DType dtype;
  const void *left, *right;  // rows of `outputs` and `inputs` elements
  int64_t left_row, right_row;
  bool padded;  // whole vectors of `right` may be read past its inputs
  int64_t rows, outputs, inputs;
  void* out;
  int64_t out_row;
};

struct FusionKernels {
  int64_t (*fusion_bytes)(const FusionLayer&);  // of the packed parameters
  int64_t (*fusion_units)(const FusionLayer&);  // that they are packed in
  void (*fusion_pack)(const FusionLayer&, int64_t unit, void* to);
  int64_t (*fusion_scratch)(const Fusion&, int64_t rows);
  void (*fusion)(const Fusion&, int64_t row, int64_t rows, void* scratch);
  int64_t (*fusion_pitch)(DType, int64_t columns);
  int64_t (*fusion_backward_scratch)(const FusionBackward&, int64_t rows);
  void (*fusion_backward)(const FusionBackward&, int64_t row, int64_t rows, void* scratch);
  // out [columns] = sums over rows that are `stride` apart.
  void (*fusion_sums)(DType, const void* x, int64_t stride, int64_t rows, int64_t columns,
                      void* out);
  int64_t (*fusion_gradient_scratch)(const FusionGradient&);
  void (*fusion_gradient)(const FusionGradient&, void* scratch);
};

}  // namespace ppmoe::ladder_attention
