// What the kernels of equilibrium_conv_cell take: raw pointers and sizes in elements.
//
// Maps are planes of wide elements (float; double for kF64), rows `pitch` apart, with zeros between
// the end of a row and the next whole vector. Planes of the first activation are `padded_pitch`
// apart a row and begin kPad elements inside it, between zeros.
#pragma once

#include <cstdint>

#include "ppmoe/types.h"

namespace ppmoe::conv_cell {

constexpr int64_t kMostHidden = 64;
constexpr int kHistory = 6;                  // differences that are kept
constexpr int kMostDots = 2 + 2 * kHistory;  // of a pass
constexpr int64_t kPad = 16;                 // elements: at least a vector

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t row_pitch(int64_t width) { return round_up(width, kPad); }
// An odd number of cache lines, so that rows at one column fall into different sets.
constexpr int64_t padded_pitch(int64_t width) {
  const int64_t lines = round_up(width, kPad) / kPad + 2;
  return kPad * (lines % 2 == 0 ? lines + 1 : lines);
}

struct Sizes {
  bool wide;                         // double
  int64_t channels, inputs, hidden;  // C, U, r
  int64_t height, width;

  int64_t pitch() const { return row_pitch(width); }
  int64_t plane() const { return height * pitch(); }
  int64_t element() const { return wide ? 8 : 4; }
};

// Weights as `pack` leaves them.
struct Linear {
  const void *weights, *bias;
};

// One evaluation: of f, or of the adjoint's g + J^T v.
struct Pass {
  Sizes sizes;
  Activation activation;
  Linear in, middle, out;  // [r, C + U], [r, 9 r], [C, r]
  const void* u;           // [U] planes; of the adjoint none
  const void* injected;    // [r] planes, added to what the first activation is taken of; or null
  // Of the adjoint: what the hidden maps are multiplied by, and what is added at the end.
  const void *first_slope, *second_slope, *shift;

  // z = values[0] - sum_j weights[j] (values[j] - values[j + 1]) for j < mixed.
  int mixed;
  const void* values[kHistory + 1];
  double weights[kHistory];
  // f(z), and f(z) - z where that is not null.
  void *value, *residual;
  // With d_j = residuals[j - 1] - residuals[j], and the new residual before the first of them:
  // dots = |f(z) - z|^2, |f(z)|^2, then d_0 d_j, then d_j (f(z) - z) for j < differences.
  int differences;
  const void* residuals[kHistory];
};

// Both activations of f and their derivatives, at z = values[0] with mixed = 0.
struct Slopes {
  Pass pass;
  void *first, *second;              // [r] padded planes with rows -1 and height; [r] planes
  void *first_slope, *second_slope;  // [r] planes
};

// The gradients at the solution v of the adjoint.
struct Gradients {
  Sizes sizes;
  const void *v, *z, *u;       // [C], [C], [U] planes
  const void *first, *second;  // as Slopes leaves them
  const void *first_slope, *second_slope;
  Linear in, middle, out;  // of the adjoint: [r, C], [r, 9 r]; and w_u^T [U, r]
  void* grad_u;            // [U] planes
};

// Numbers of a band's sums, in this order: w_u and w1 and b1 as [r, U + C + 1], w2 and b2 as
// [r, 9 r + 1], w3 and b3 as [C, r + 1].
constexpr int64_t sums_of(const Sizes& s) {
  return s.hidden * (s.inputs + s.channels + 1) + s.hidden * (9 * s.hidden + 1) +
         s.channels * (s.hidden + 1);
}

// `planes` planes of [height, width] in `dtype` that lie closed, to or from planes of wide
// elements.
struct Copy {
  DType dtype;
  int64_t planes, height, width;
  const void* from;  // null: zeros
  void* to;
};

struct Kernels {
  // Elements of the packed [outputs, inputs].
  void (*pack)(bool wide, const void* matrix, int64_t outputs, int64_t inputs, void* to);
  void (*widen)(DType, const void* from, int64_t n, void* to);
  double (*load)(const Copy&, int64_t first, int64_t past);  // rows; returns the sum of squares
  void (*store)(const Copy&, int64_t first, int64_t past);
  int64_t (*scratch)(const Sizes&);  // bytes of a thread, for all that follow but the gradients
  // Rows first to past. `dots` are as Pass says.
  void (*evaluate)(const Pass&, int64_t first, int64_t past, void* scratch, double* dots);
  void (*adjoint)(const Pass&, int64_t first, int64_t past, void* scratch, double* dots);
  // The injection alone: `in` is [r, U].
  void (*inject)(const Pass&, void* to, int64_t first, int64_t past, void* scratch);
  void (*slopes)(const Slopes&, int64_t first, int64_t past, void* scratch);
  int64_t (*gradients_scratch)(const Sizes&, int64_t rows);
  void (*gradients)(const Gradients&, int64_t first, int64_t past, void* scratch, double* sums);
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

}  // namespace ppmoe::conv_cell
