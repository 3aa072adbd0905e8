// What the kernels of equilibrium_cell take: raw pointers, strides and sizes in elements.
#pragma once

#include <cstdint>

#include "ppmoe/product.h"
#include "ppmoe/types.h"

namespace ppmoe::cell {

enum class Solver : int { kFixedPoint, kAnderson, kNewton };

// Rows of c, each a solve of its own. `a` is packed; c and x0 have any strides, x is closed.
struct Solve {
  DType dtype;
  Activation activation;
  Solver solver;
  double atol, rtol;
  int64_t max_iter;
  int64_t r;
  const void* a;
  Matrix c, x0;  // x0.data may be null: zeros
  void* x;
  int32_t* steps;
  void* residual;  // float, or double for double
};

// Rows of the gradient of x to rows of the gradient of c.
struct Adjoint {
  DType dtype;
  Activation activation;
  int64_t r;
  const void *a, *turned;  // both packed: a and its transpose
  Matrix grad, c, x;
  const void* residual;
  int64_t residual_stride;
  void* grad_c;  // closed
  // Closed rows, `pitch` apart, of the accumulation type with zeros behind: those of the gradient
  // and of x, which the gradient of a is a product of.
  void *wide_grad, *wide_x;
  int64_t pitch;
};

struct Kernels {
  int64_t (*lanes)(DType);
  void (*pack)(DType, const Matrix& a, int64_t r, void* to);  // r * r of the accumulation type
  int64_t (*solve_scratch)(const Solve&);
  void (*solve)(const Solve&, int64_t row, int64_t rows, void* scratch);
  int64_t (*adjoint_scratch)(const Adjoint&);
  void (*adjoint)(const Adjoint&, int64_t row, int64_t rows, void* scratch);
  // A [r, pitch] part of the gradient of a: the sum over rows of v x^T.
  void (*outer)(const Adjoint&, int64_t row, int64_t rows, void* part);
  // The gradient of a: the sum of the parts, rounded to the dtype.
  void (*sum_parts)(const Adjoint&, const void* parts, int64_t count, void* grad_a);
};

const Kernels& kernels();

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

}  // namespace ppmoe::cell
