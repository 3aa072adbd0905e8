// equilibrium_cell by plain iteration and by Anderson's method.
#include "cpu/equilibrium/cell.h"

namespace ppmoe::cell::PPMOE_ISA {
namespace {

constexpr int kHistory = 6;

// Sums of float32 are off by 1e-6 of a column's norm at most. What is added to the diagonal is
// more, so that the factor exists; on cells it costs no step.
constexpr float ridge_of(float) { return 4e-6f; }
constexpr double ridge_of(double) { return 1e-12; }

template <class V>
void fixed_point(const Solve& p, int64_t row, int64_t count, char* scratch) {
  Rows<V> rows(p, row, count, scratch);
  Evaluation<V> e{};
  e.a = static_cast<const Scalar<V>*>(p.a), e.r = p.r, e.c = rows.c;
  e.residual = rows.residual;
  const auto f = evaluator<false, V>(p.activation);
  while (rows.running != 0) {
    e.z = rows.z, e.image = rows.image, e.scale = rows.scale;
    f(e);
    rows.observe(e.residual_square, e.image_square, Mask<V>{});
    V* const z = rows.z;
    rows.z = rows.image, rows.image = z;
    rows.refill();
  }
}

// The last differences of residuals (times the lane's scale) and of images, in a ring that all
// lanes turn together. A lane has `size` of them, the last ones; an older column counts for nothing
// in it: its inverse norm is zero.
template <class V>
struct History {
  V *residuals, *images;  // [6][r]
  V *last_image, *last_residual;
  V inverse[kHistory];         // of the columns' norms
  V gram[kHistory][kHistory];  // of the columns at unit norm; [i][j], i pushed after j
  V size{}, last_norm{};
  int64_t pushed = 0;
};

template <class V>
struct Push {
  History<V>& h;
  Rows<V>& rows;
  const Mask<V>& pushes;
  int slots[kHistory];  // of the window, the oldest first
};

// Takes in a difference, and mixes the window's kWindow columns into the next point.
template <int kWindow, class V>
void mix(Push<V>& p) {
  constexpr int kNew = kWindow - 1;
  using S = Scalar<V>;
  History<V>& h = p.h;
  const Rows<V>& rows = p.rows;
  const int64_t r = rows.p.r;
  const V *past[kWindow], *images[kWindow];
#pragma GCC unroll 6
  for (int j = 0; j < kWindow; ++j) {
    past[j] = h.residuals + p.slots[j] * r;
    images[j] = h.images + p.slots[j] * r;
  }
  V* const residual_out = h.residuals + p.slots[kNew] * r;
  V* const image_out = h.images + p.slots[kNew] * r;
  V dots[kWindow] = {}, right[kWindow] = {};
  for (int64_t i = 0; i < r; ++i) {
    const V g = rows.residual[i] * rows.scale;
    const V moved = (rows.residual[i] - h.last_residual[i]) * rows.scale;
    const V difference = p.pushes ? moved : V{};
    const V image = rows.image[i] - h.last_image[i];
    residual_out[i] = difference;
    image_out[i] = p.pushes ? image : V{};
#pragma GCC unroll 6
    for (int j = 0; j < kNew; ++j) {
      const V column = past[j][i];
      dots[j] += column * difference;
      right[j] += column * g;
    }
    dots[kNew] += difference * difference;
    right[kNew] += difference * g;
  }
  const int fresh = p.slots[kNew];
  const V one = V{} + 1;
  const Mask<V> usable = (dots[kNew] > 0) & (dots[kNew] < S(__builtin_inf()));
  const V inverse = usable ? one / root(dots[kNew]) : V{};
  h.inverse[fresh] = inverse;
#pragma GCC unroll 6
  for (int j = 0; j < kNew; ++j) {
    h.gram[fresh][p.slots[j]] = dots[j] * h.inverse[p.slots[j]] * inverse;
  }

  // Sums start from zero, as columns that count for nothing in a lane must leave no trace: a
  // multiply-add would else round the first product or not, by how long the window is.
  Mask<V> finite = one > 0;
  V y[kWindow], pivot[kWindow], lower[kWindow][kWindow];
#pragma GCC unroll 6
  for (int i = 0; i < kWindow; ++i) {
    V crossed[kWindow];
    V diagonal = V{} + (1 + ridge_of(S{}));
#pragma GCC unroll 6
    for (int j = 0; j < i; ++j) {
      V each = h.gram[p.slots[i]][p.slots[j]];
#pragma GCC unroll 6
      for (int k = 0; k < j; ++k) each -= lower[j][k] * crossed[k];
      crossed[j] = each;
      lower[i][j] = each * pivot[j];
      diagonal -= each * lower[i][j];
    }
    pivot[i] = one / diagonal;
    finite &= pivot[i] > 0;
    V s{};
#pragma GCC unroll 6
    for (int k = 0; k < i; ++k) s += lower[i][k] * y[k];
    y[i] = right[i] * h.inverse[p.slots[i]] - s;
  }
#pragma GCC unroll 6
  for (int i = kWindow - 1; i >= 0; --i) {
    V s{};
#pragma GCC unroll 6
    for (int k = kWindow - 1; k > i; --k) s += lower[k][i] * y[k];
    y[i] = y[i] * pivot[i] - s;
  }
  V weights[kWindow];
#pragma GCC unroll 6
  for (int j = 0; j < kWindow; ++j) {
    weights[j] = y[j] * h.inverse[p.slots[j]];
    finite &= weights[j] - weights[j] == 0;
  }
#pragma GCC unroll 6
  for (int j = 0; j < kWindow; ++j) weights[j] = finite ? weights[j] : V{};
  for (int64_t i = 0; i < r; ++i) {
    V z = rows.image[i];
#pragma GCC unroll 6
    for (int j = 0; j < kWindow; ++j) z -= weights[j] * images[j][i];
    rows.z[i] = z;
  }
}

// Nothing in these lanes counts any more.
template <class V>
void forget(History<V>& h, const Mask<V>& lanes) {
  for (int i = 0; i < kHistory; ++i) {
    h.inverse[i] = lanes ? V{} : h.inverse[i];
    for (int j = 0; j < kHistory; ++j) h.gram[i][j] = lanes ? V{} : h.gram[i][j];
  }
}

template <class V>
PPMOE_INLINE int largest_size(V size) {
  int most = 0;
  for (int i = 0; i < kCount<V>; ++i) most = size[i] > most ? static_cast<int>(size[i]) : most;
  return most;
}

template <class V>
void step(History<V>& h, Rows<V>& rows) {
  const Mask<V> run = mask_of<V>(rows.running) & ~mask_of<V>(rows.fresh) & ~rows.rescaled;
  const Mask<V> restart = (h.size > 0) & ~(rows.norm <= h.last_norm);
  const Mask<V> pushes = run & ~restart;
  const Mask<V> dropped = mask_of<V>(rows.running) & ~pushes & (h.size > 0);
  h.last_norm = rows.norm;
  if (some(dropped)) forget<V>(h, dropped);
  // More columns than elements are never independent.
  const auto most = static_cast<Scalar<V>>(rows.p.r < kHistory ? rows.p.r : kHistory);
  const V more = h.size < most ? h.size + 1 : h.size;
  h.size = pushes ? more : V{};
  const int window = largest_size(h.size);
  if (window == 0) {
    for (int64_t i = 0; i < rows.p.r; ++i) rows.z[i] = rows.image[i];
  } else {
    Push<V> push{h, rows, pushes, {}};
    const int64_t first = h.pushed + 1 - window;
    for (int j = 0; j < window; ++j) push.slots[j] = static_cast<int>((first + j) % kHistory);
    ++h.pushed;
    switch (window) {
      case 1: mix<1>(push); break;
      case 2: mix<2>(push); break;
      case 3: mix<3>(push); break;
      case 4: mix<4>(push); break;
      case 5: mix<5>(push); break;
      default: mix<6>(push); break;
    }
  }
  V* const image = rows.image;
  rows.image = h.last_image, h.last_image = image;
  V* const residual = rows.residual;
  rows.residual = h.last_residual, h.last_residual = residual;
}

template <class V>
void anderson(const Solve& p, int64_t row, int64_t count, char* scratch) {
  Rows<V> rows(p, row, count, scratch);
  History<V> h;
  h.residuals = take<V>(scratch, kHistory * p.r);
  h.images = take<V>(scratch, kHistory * p.r);
  h.last_image = take<V>(scratch, p.r);
  h.last_residual = take<V>(scratch, p.r);
  Evaluation<V> e{};
  e.a = static_cast<const Scalar<V>*>(p.a), e.r = p.r, e.c = rows.c, e.z = rows.z;
  const auto f = evaluator<false, V>(p.activation);
  while (true) {
    e.image = rows.image, e.residual = rows.residual, e.scale = rows.scale;
    f(e);
    rows.observe(e.residual_square, e.image_square, Mask<V>{});
    if (rows.running == 0 && rows.next == rows.end) break;
    step(h, rows);
    const uint32_t old = rows.running;
    rows.refill();
    if (rows.fresh != 0 && old != 0) {
      // The columns of the rows before them may hold anything, and are multiplied by zero.
      const Mask<V> lanes = mask_of<V>(rows.fresh);
      for (int64_t i = 0; i < kHistory * p.r; ++i) {
        h.residuals[i] = lanes ? V{} : h.residuals[i];
        h.images[i] = lanes ? V{} : h.images[i];
      }
      forget<V>(h, lanes);
    }
    if (rows.fresh != 0) h.size = mask_of<V>(rows.fresh) ? V{} : h.size;
  }
}

template <class T>
void pack_as(const Matrix& m, int64_t r, wide_t<T>* to) {
  const T* const from = static_cast<const T*>(m.data);
  by_groups(r, [&](int64_t i, auto tag) {
    constexpr int kWidth = width_of(decltype(tag){});
    wide_t<T>* out = to + i * r;
    for (int64_t k = 0; k < r; ++k) {
      for (int b = 0; b < kWidth; ++b) {
        *out++ = to_float(from[(i + b) * m.row_stride + k * m.col_stride]);
      }
    }
  });
}

void pack(DType dtype, const Matrix& a, int64_t r, void* to) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    pack_as<T>(a, r, static_cast<wide_t<T>*>(to));
    return 0;
  });
}

int64_t lanes(DType dtype) { return dtype == DType::kF64 ? kLanes / 2 : kLanes; }

template <class V>
void solve_as(const Solve& p, int64_t row, int64_t rows, char* scratch) {
  if (p.solver == Solver::kAnderson) return anderson<V>(p, row, rows, scratch);
  fixed_point<V>(p, row, rows, scratch);
}

void solve(const Solve& p, int64_t row, int64_t rows, void* scratch) {
  if (p.solver == Solver::kNewton) return newton(p, row, rows, scratch);
  if (p.dtype == DType::kF64) return solve_as<VecD>(p, row, rows, static_cast<char*>(scratch));
  solve_as<VecF>(p, row, rows, static_cast<char*>(scratch));
}

}  // namespace

int64_t solve_scratch(const Solve& p) {
  if (p.solver == Solver::kNewton) return newton_scratch(p);
  const int64_t kept = p.solver == Solver::kAnderson ? 2 * kHistory + 2 : 0;
  return (Rows<VecF>::kVectors + kept) * p.r * kBytes;
}

extern const Kernels kKernels;
const Kernels kKernels = {
    lanes, pack, solve_scratch, solve, adjoint_scratch, adjoint, outer, sum_parts,
};

}  // namespace ppmoe::cell::PPMOE_ISA
