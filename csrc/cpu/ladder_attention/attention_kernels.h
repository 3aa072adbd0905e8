// What the attention kernels take: raw pointers, strides and sizes in elements.
#pragma once

#include <cstdint>

#include "ppmoe/types.h"

namespace ppmoe::ladder_attention {

// A map [B, H, W, C], or a part of its channels.
struct Map {
  void* data;
  int64_t image, row, column, channel;
};

// How an axis is cut into windows: at `first` and then at every `window`; `first` is at most the
// window.
struct Cut {
  int64_t length, window, first, count;

  static Cut of(int64_t length, int64_t window, int64_t shift) {
    int64_t first = shift % window;
    if (first <= 0) first += window;
    const int64_t more = length > first ? (length - first + window - 1) / window : 0;
    return {length, window, first, length > 0 ? 1 + more : 0};
  }
  int64_t begin(int64_t i) const { return i == 0 ? 0 : first + (i - 1) * window; }
  int64_t end(int64_t i) const {
    const int64_t next = first + i * window;
    return next < length ? next : length;
  }
  int64_t longest() const { return window < length ? window : length; }
};

struct Attention {
  Map q, k, v, out;
  DType dtype;       // of the maps
  const void* bias;  // [heads, R] float (double for kF64) with kBiasSlack elements behind, or null
  int64_t heads, head_dim;
  double scale;
  Cut rows, columns;

  int64_t windows() const { return rows.count * columns.count; }
};

// Vectors of the bias table are read past its end.
constexpr int64_t kBiasSlack = 64;

struct AttentionBackward {
  Attention forward;  // `out` may have null data, else the result of the forward is written there
  Map grad, grad_q, grad_k, grad_v;
};

// Rows of x, one after another: normalised, and multiplied by packed weights.
struct BranchIn {
  Map x;
  int64_t height, width;  // of an image
  int64_t channels, outputs;
  DType dtype;
  const void *ln_w, *ln_b;  // [channels] float (double for kF64)
  const void* weights;      // packed, of `outputs` outputs
  const void* bias;         // [outputs] float (double for kF64)
  double eps;
  void* normed;  // rows of packed elements, or null
  void* out;     // rows of packed elements
  // Backward: rows of grad times the image's scale, and that times the packed output weights.
  Map grad;
  const void* row_scale;    // [B] float (double for kF64), or null
  const void* out_weights;  // packed, of w_out transposed; null forward
  void *scaled, *grad_attention;
  // Where v comes from outside in a dtype that is not the packed one: its rows, or null.
  Map v;
  void* v_rows;
};

// z = x + s * (rows @ weights + bias [+ normed]).
struct BranchOut {
  Map x, out;
  int64_t height, width, channels;
  DType dtype;
  const void* attended;  // rows of packed elements
  const void* normed;    // the same, or null
  const void* weights;   // packed
  const void* bias;      // [channels] float (double for kF64)
  const void* row_scale;
};

// grad_x = grad + LN'(grad_in @ w_in [+ scaled]); sums for the norm's parameters in `sums`.
struct BranchInBackward {
  Map x, grad, grad_x;  // grad_x.data may be null
  int64_t height, width, channels, inputs;
  DType dtype;
  const void* ln_w;
  double eps;
  const void* grad_in;  // rows of packed elements, `inputs` wide
  const void* scaled;   // the shortcut's gradient, or null
  const void* weights;  // packed w_in transposed
  void* sums;           // [2, sums_stride] wide, or null
  int64_t sums_stride;
};

// out [outputs, inputs] = left^T @ right, both rows of packed elements with slack behind them.
struct WeightGradient {
  const void *left, *right;
  int64_t tokens, outputs, inputs;
  DType dtype;  // of out
  void* out;
};

constexpr int64_t kRowBlock = 48;  // rows that share one pass over the weights

struct AttentionKernels {
  // What rows between two products are stored as, and how far apart rows of n elements are.
  DType (*packed_dtype)(DType);
  int64_t (*packed_stride)(DType, int64_t n);
  int64_t (*weight_bytes)(DType, int64_t outputs, int64_t depth);
  int64_t (*weight_panels)(DType, int64_t outputs);
  // Packs panels begin to end of w, output o and depth d being at w[o * row + d * column].
  void (*pack_weights)(DType, const void* w, int64_t row, int64_t column, int64_t outputs,
                       int64_t depth, int64_t begin, int64_t end, void* to);

  int64_t (*attention_scratch)(const Attention&);
  // Windows begin to end (of all images) of `heads` heads from `head` on.
  void (*attention)(const Attention&, int64_t begin, int64_t end, int64_t head, int64_t heads,
                    void* scratch);
  int64_t (*attention_backward_scratch)(const AttentionBackward&);
  // Windows begin to end (of all images) of one head; adds into table [R] wide unless it is null.
  void (*attention_backward)(const AttentionBackward&, int64_t head, int64_t begin, int64_t end,
                             void* table, void* scratch);

  int64_t (*branch_in_scratch)(const BranchIn&);
  void (*branch_in)(const BranchIn&, int64_t begin, int64_t end, void* scratch);  // rows
  int64_t (*branch_out_scratch)(const BranchOut&);
  void (*branch_out)(const BranchOut&, int64_t begin, int64_t end, void* scratch);
  int64_t (*branch_in_backward_scratch)(const BranchInBackward&);
  void (*branch_in_backward)(const BranchInBackward&, int64_t begin, int64_t end, void* scratch);
  int64_t (*weight_gradient_scratch)(const WeightGradient&);
  // Of at most kRowBlock outputs.
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end, void* scratch);
  // Between a dtype and what it is summed in.
  void (*narrow)(DType, const void* from, int64_t n, void* to);
  void (*widen)(DType, const void* from, int64_t stride, int64_t n, void* to);
};

}  // namespace ppmoe::ladder_attention
