// Gradients of equilibrium_cell: an adjoint solve for every row, and the sum of their products.
#include "cpu/equilibrium/cell_lu.h"

namespace ppmoe::cell::PPMOE_ISA {
namespace {

template <class V>
void run(const Adjoint& p, int64_t row, int64_t count, char* scratch) {
  using S = Scalar<V>;
  const int64_t r = p.r;
  const S* const turned = static_cast<const S*>(p.turned);
  V* const c = take<V>(scratch, r);
  V* const x = take<V>(scratch, r);
  V* const v = take<V>(scratch, r);
  V* const g = take<V>(scratch, r);
  V* const image = take<V>(scratch, r);
  V* const residual = take<V>(scratch, r);
  V* const turn = take<V>(scratch, r);
  V* const right = take<V>(scratch, r);
  V* const matrix = take<V>(scratch, r * r);
  Pivot<V>* const pivots = reinterpret_cast<Pivot<V>*>(scratch);
  for (int64_t i = 0; i < r; ++i) c[i] = x[i] = g[i] = V{};
  Evaluation<V> e{};
  e.a = static_cast<const S*>(p.a), e.r = r, e.c = c, e.z = x;
  e.image = image, e.residual = residual, e.turn = turn;
  const auto f = evaluator<true, V>(p.activation);
  for (int64_t done = 0; done < count; done += kCount<V>) {
    const int lanes = static_cast<int>(count - done < kCount<V> ? count - done : kCount<V>);
    V flagged{};  // NaN where there is no gradient
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t n = row + done + lane;
      load_lane(p.dtype, p.c, n, r, lane, c);
      load_lane(p.dtype, p.x, n, r, lane, x);
      load_lane(p.dtype, p.grad, n, r, lane, g);
      const S each = static_cast<const S*>(p.residual)[n * p.residual_stride];
      flagged[lane] = each - each;
    }
    f(e);
    newton_matrix(turned, r, turn, matrix);
    factor(matrix, r, pivots);
    for (int64_t i = 0; i < r; ++i) right[i] = turn[i] * g[i];
    substitute(matrix, r, pivots, right);
    // What LU rounded off, which for wide cells is more than an iteration would: solved for once
    // more.
    for (int64_t i = 0; i < r; ++i) v[i] = right[i];
    affine(turned, r, g, v, right);
    for (int64_t i = 0; i < r; ++i) right[i] = turn[i] * right[i] - v[i];
    substitute(matrix, r, pivots, right);
    for (int64_t i = 0; i < r; ++i) v[i] += right[i] + flagged;
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t n = row + done + lane;
      store_lane(p.dtype, v, lane, n, r, p.grad_c);
      S* const wide_grad = static_cast<S*>(p.wide_grad) + n * p.pitch;
      S* const wide_x = static_cast<S*>(p.wide_x) + n * p.pitch;
      for (int64_t i = 0; i < p.pitch; ++i) {
        wide_grad[i] = i < r ? reinterpret_cast<const S*>(v)[i * kCount<V> + lane] : S{};
        wide_x[i] = i < r ? reinterpret_cast<const S*>(x)[i * kCount<V> + lane] : S{};
      }
    }
  }
}

constexpr int64_t kTall = 4;

// kTall rows of a part at once. What is read behind a row's end is not stored.
template <class V>
void outer_as(const Adjoint& p, int64_t row, int64_t count, Scalar<V>* part) {
  using S = Scalar<V>;
  const S* const left = static_cast<const S*>(p.wide_grad) + row * p.pitch;
  const S* const right = static_cast<const S*>(p.wide_x) + row * p.pitch;
  for (int64_t i = 0; i < p.r; i += kTall) {
    for (int64_t j = 0; j < p.pitch; j += kCount<V>) {
      V sums[kTall] = {};
      for (int64_t n = 0; n < count; ++n) {
        const V x = load<V>(right + n * p.pitch + j);
#pragma GCC unroll 4
        for (int64_t b = 0; b < kTall; ++b) sums[b] += x * left[n * p.pitch + i + b];
      }
      for (int64_t b = 0; b < kTall && i + b < p.r; ++b) {
        store(part + (i + b) * p.pitch + j, sums[b]);
      }
    }
  }
}

template <class T>
void sum_as(const Adjoint& p, const wide_t<T>* parts, int64_t count, T* grad_a) {
  for (int64_t i = 0; i < p.r; ++i) {
    for (int64_t j = 0; j < p.r; ++j) {
      wide_t<T> sum{};
      for (int64_t n = 0; n < count; ++n) sum += parts[(n * p.r + i) * p.pitch + j];
      grad_a[i * p.r + j] = narrow<T>(sum);
    }
  }
}

}  // namespace

int64_t adjoint_scratch(const Adjoint& p) {
  return (8 + p.r) * p.r * kBytes + pivot_bytes<VecF>(p.r);
}

void adjoint(const Adjoint& p, int64_t row, int64_t rows, void* scratch) {
  if (p.dtype == DType::kF64) return run<VecD>(p, row, rows, static_cast<char*>(scratch));
  run<VecF>(p, row, rows, static_cast<char*>(scratch));
}

void outer(const Adjoint& p, int64_t row, int64_t rows, void* part) {
  if (p.dtype == DType::kF64) return outer_as<VecD>(p, row, rows, static_cast<double*>(part));
  outer_as<VecF>(p, row, rows, static_cast<float*>(part));
}

void sum_parts(const Adjoint& p, const void* parts, int64_t count, void* grad_a) {
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    sum_as<T>(p, static_cast<const wide_t<T>*>(parts), count, static_cast<T*>(grad_a));
    return 0;
  });
}

}  // namespace ppmoe::cell::PPMOE_ISA
