// What the instruction-set specific kernels of expert slicing take, and the table they are called
// through. Raw pointers only: these sources see no torch header. All matrices are row-major with
// the row stride given; strides and sizes are in elements.
#pragma once

#include <cstdint>

#include "ppmoe/product.h"
#include "ppmoe/types.h"

namespace ppmoe::expert_slice {

struct Route {
  const void* logits;  // [T, E] of dtype
  int64_t stride;
  DType dtype;
  int64_t experts, top_k;
  bool softmax, renormalize;
  const void* bias;  // [E] float (double for kF64), or null
  int64_t groups, top_groups;
  double scale;
  void* weights;  // [T, K] float (double for kF64)
  int32_t* ids;   // [T, K]
};

struct RouteBackward {
  const void* grad;     // [T, K] float (double for kF64)
  const void* weights;  // [T, K], as grad
  const int32_t* ids;   // [T, K]
  const void* logits;   // [T, E] of dtype, or null where the formula does without
  int64_t stride;
  DType dtype;
  int64_t experts, top_k;
  bool softmax, renormalize;
  double scale;
  void* out;  // [T, E] of dtype
};

struct Losses {
  const void* logits;  // [T, E] of dtype
  int64_t stride;
  DType dtype;
  int64_t experts;
  void* lse;  // [T] float (double for kF64)
};

struct LossesBackward {
  const void* logits;
  int64_t stride;
  DType dtype;
  int64_t experts;
  double balance;      // upstream gradient times E / T
  double z;            // upstream gradient times 2 / T
  const void* shares;  // [E] float (double for kF64)
  const void* lse;     // [T], as shares
  void* out;           // [T, E] of dtype
};

struct Index {
  const void* experts;  // [T*K] int32, or int64 where wide
  bool wide;
  int64_t first, local;
  int32_t* slots;
};

// Where one chunk's slots of one expert go.
struct Stream {
  int32_t* first;
  int32_t* next;
};

struct alignas(64) Line {
  int32_t slots[16];
};

// Every row of x to the rows of its slots: a row is read once, however many slots it has.
struct Slice {
  const void* x;  // [T, H]
  int64_t stride;
  int64_t row_bytes, element_bytes;
  const int32_t* slots;    // [T*K]
  const int32_t* inverse;  // [T*K], -1 where foreign
  int64_t top_k;
  void* out;    // [T*K, H]
  bool stream;  // stores go past the caches
};

// out[t] = sum over k of weights[t, k] * rows[inverse[t*K + k]]; null weights are ones.
struct Merge {
  const void* rows;
  int64_t stride;
  DType dtype;
  int64_t width, top_k;
  const int32_t* inverse;  // [T*K], -1 where foreign
  const void* weights;     // [T, K] float (double for kF64)
  void* out;               // [T, H]
  bool stream;
};

struct MergeBackward {
  const void* grad;  // [T, H]
  int64_t grad_stride;
  const void* rows;  // [T*K, H]
  int64_t stride;
  DType dtype;
  int64_t width, top_k;
  const int32_t* slots;
  const void* weights;
  void* grad_rows;     // [T*K, H]
  void* grad_weights;  // [T*K], zero before
  bool stream;
};

// Weights of all experts: element (e, i, j) at e * expert + i * row + j * col.
struct Experts {
  const void* data;
  int64_t expert, row, col;
};

// Some rows of one expert, in the order of its slots. `panels` is where what is made of them for
// the second product lies: packed, or for few rows as they are.
struct FfnBlock {
  int64_t expert, row, rows;
  int64_t group;  // rows of the expert
  int64_t panels;
};

// The first half of experts, forward: act(x @ w_in + b_in) for columns of one block.
struct FfnIn {
  const void* x;  // [T, H], rows closed
  int64_t x_stride;
  const int32_t* tokens;  // of every row
  Experts w_in;           // [L, F or 2F, H]
  const void* b_in;       // [L, F or 2F], or null
  bool plain;             // few rows go on as they are
  void* pre;              // [R, F or 2F], or null
  char* panels;
  DType dtype;
  Activation activation;
  bool gated;
  int64_t hidden, width;
};

// The same backward: from the gradient of the output to that of the pre-activation.
struct FfnInBackward {
  const void* grad;  // [T, H], rows closed
  int64_t grad_stride;
  const int32_t* tokens;
  const void* weights;  // [R] float (double for kF64)
  Experts w_out;        // [L, H, F]
  const void* pre;      // [R, F or 2F]
  void* grad_pre;       // [R, F or 2F]
  char* panels;         // of grad_pre, or null
  void* activated;      // [R, F], times the weight; or null
  void* dots;           // [R, dot_slabs]: activation times its gradient, a sum a slab; or null
  int64_t dot_slabs;
  DType dtype;
  Activation activation;
  bool gated;
  int64_t hidden, width;
};

// The second half: products that are merged into the rows of their tokens.
// out[tokens[r]] = sum of weights[r] * (panels[r] @ w[e] + bias[e]), for columns of some tokens.
struct FfnOut {
  const char* panels;
  int64_t depth, depths;  // every row has `depths` parts of `depth` elements, packed apart
  Experts w;              // [L, depths * depth, H]
  const void* bias;       // [L, H], or null
  bool plain;
  const int32_t* tokens;
  const void* weights;  // [R] float (double for kF64), or null for ones
  void* out;            // [T, H]
  DType dtype;
  int64_t hidden;
};

// Blocks of tokens first to first + tokens, and the columns that one thread makes of them.
struct FfnOutTask {
  const FfnBlock* blocks;
  int64_t count, first, tokens, column, columns;
};

struct FfnWeightsBackward {
  const void* dots;  // [R, dot_slabs] float (double for kF64)
  int64_t dot_slabs;
  const void* grad;  // [T, H], rows closed
  int64_t grad_stride;
  const int32_t* tokens;
  const int32_t* slots;
  const void* bias;  // [L, H] of dtype, or null
  void* out;         // [T*K], as dots
  DType dtype;
  int64_t hidden;
};

struct Kernels {
  int64_t (*route_scratch)(const Route&);  // bytes a thread needs
  void (*route)(const Route&, int64_t begin, int64_t end, void* scratch);
  void (*route_backward)(const RouteBackward&, int64_t begin, int64_t end);
  // Adds the rows' softmax into mass [E] and lse^2 into z; mass is float (double for kF64).
  void (*losses)(const Losses&, int64_t begin, int64_t end, void* mass, double* z);
  void (*losses_backward)(const LossesBackward&, int64_t begin, int64_t end);
  // Counts local ids into four tables of `local`; their sum is the count.
  void (*count)(const Index&, int64_t begin, int64_t end, int32_t* counts);
  // Writes each local slot through its expert's stream, which moves on; `lines` is scratch.
  void (*place)(const Index&, int64_t begin, int64_t end, Stream* streams, Line* lines);
  void (*slice)(const Slice&, int64_t begin, int64_t end);        // of tokens
  void (*slice_clear)(const Slice&, int64_t begin, int64_t end);  // of rows; those without a slot
  void (*merge)(const Merge&, int64_t begin, int64_t end);
  void (*merge_backward)(const MergeBackward&, int64_t begin, int64_t end);
  int64_t (*gemm_scratch)(const Gemm&);
  void (*gemm)(const Gemm&, void* scratch);
  // Sums over the rows, times weights [m] where these are not null.
  void (*column_sums)(const Matrix&, const void* weights, DType, int64_t m, int64_t n, void* out);
  // Bytes of a block's panels: `parts` times [rows, depth].
  int64_t (*ffn_panel_bytes)(DType, int64_t rows, int64_t depth, int64_t parts);
  int64_t (*ffn_in_scratch)(const FfnIn&, const FfnBlock&);
  void (*ffn_in)(const FfnIn&, const FfnBlock&, int64_t column, int64_t columns, void* scratch);
  int64_t (*ffn_in_backward_scratch)(const FfnInBackward&, const FfnBlock&);
  void (*ffn_in_backward)(const FfnInBackward&, const FfnBlock&, int64_t column, int64_t columns,
                          void* scratch);
  int64_t (*ffn_out_scratch)(const FfnOut&, const FfnOutTask&);
  void (*ffn_out)(const FfnOut&, const FfnOutTask&, void* scratch);
  // grad_weights[slots[r]] = sum of dots[r], plus <grad[tokens[r]], bias[expert of the block]>.
  void (*ffn_weights_backward)(const FfnWeightsBackward&, const FfnBlock&);
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

}  // namespace ppmoe::expert_slice
