// What the kernels of equilibrium_cell share: a vector holds an element of many rows, one to a
// lane.
#pragma once

#include "cpu/equilibrium/cell_kernels.h"
#include "ppmoe/activation.h"

namespace ppmoe::cell::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

int64_t solve_scratch(const Solve&);
void newton(const Solve&, int64_t row, int64_t rows, void* scratch);
int64_t newton_scratch(const Solve&);
int64_t adjoint_scratch(const Adjoint&);
void adjoint(const Adjoint&, int64_t row, int64_t rows, void* scratch);
void outer(const Adjoint&, int64_t row, int64_t rows, void* part);
void sum_parts(const Adjoint&, const void* parts, int64_t count, void* grad_a);

namespace {

template <class V>
using Scalar = decltype(V{}[0] + V{}[0]);
template <class V>
using Mask = decltype(V{} < V{});
template <class V>
inline constexpr int kCount = sizeof(V) / sizeof(Scalar<V>);

PPMOE_INLINE bool some(VecI mask) { return any(mask); }
PPMOE_INLINE bool some(VecL mask) { return any(reinterpret_cast<VecI>(mask)); }

// One bit a lane, and back.
PPMOE_INLINE uint32_t bits_of(VecI mask) {
#if defined(__AVX512F__)
  const __m512i v = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi32_mask(v, v);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
PPMOE_INLINE uint32_t bits_of(VecL mask) {
#if defined(__AVX512F__)
  const __m512i v = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi64_mask(v, v);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes / 2; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
template <class V>
PPMOE_INLINE Mask<V> mask_of(uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar<V>) == 4) {
    return reinterpret_cast<Mask<V>>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
  } else {
    return reinterpret_cast<Mask<V>>(_mm512_movm_epi64(static_cast<__mmask8>(bits)));
  }
#endif
  Mask<V> mask;
  for (int i = 0; i < kCount<V>; ++i) mask[i] = -static_cast<int>(bits >> i & 1);
  return mask;
}
PPMOE_INLINE bool has(uint32_t bits, int lane) { return bits >> lane & 1; }

PPMOE_INLINE VecF root(VecF x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
PPMOE_INLINE VecD root(VecD x) {
  for (int i = 0; i < kLanes / 2; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// A power of two that brings x > 0 near 1, so that squares neither overflow nor vanish.
PPMOE_INLINE VecF power_near(VecF x) {
  const VecI exponent = reinterpret_cast<VecI>(x) & 0x7f800000;
  return reinterpret_cast<VecF>(0x7f000000 -
                                (exponent > 0x7e800000 ? VecI{} + 0x7e800000 : exponent));
}
PPMOE_INLINE VecD power_near(VecD x) {
  constexpr int64_t kMost = int64_t{0x7fd} << 52;
  const VecL exponent = reinterpret_cast<VecL>(x) & int64_t{0x7ff} << 52;
  return reinterpret_cast<VecD>((int64_t{0x7fe} << 52) -
                                (exponent > kMost ? VecL{} + kMost : exponent));
}

// A packed matrix: outputs in groups of 8, then of 4, 2 and 1 as they fit, and within a group all
// outputs of an input together.
constexpr int kGroup = 8;
template <class F>
PPMOE_INLINE void by_groups(int64_t r, const F& body) {
  int64_t i = 0;
  for (; i + kGroup <= r; i += kGroup) body(i, Tag<char[kGroup]>{});
  if (r & 4) body(i, Tag<char[4]>{}), i += 4;
  if (r & 2) body(i, Tag<char[2]>{}), i += 2;
  if (r & 1) body(i, Tag<char[1]>{});
}
template <int kWidth>
constexpr int width_of(Tag<char[kWidth]>) {
  return kWidth;
}

template <int kWidth, class V>
PPMOE_INLINE void product(const Scalar<V>* a, int64_t r, const V* c, const V* z, V* out) {
  V sums[kWidth] = {};
  for (int64_t k = 0; k < r; ++k, a += kWidth) {
    const V each = z[k];
#pragma GCC unroll 8
    for (int b = 0; b < kWidth; ++b) sums[b] += each * a[b];
  }
#pragma GCC unroll 8
  for (int b = 0; b < kWidth; ++b) out[b] = sums[b] + c[b];
}

// out = a z + c.
template <class V>
PPMOE_INLINE void affine(const Scalar<V>* a, int64_t r, const V* c, const V* z, V* out) {
  by_groups(r, [&](int64_t i, auto width) __attribute__((always_inline)) {
    product<width_of(decltype(width){})>(a + i * r, r, c + i, z, out + i);
  });
}

// Where an evaluation of f puts what. Norms are squares, of values times a lane's scale.
template <class V>
struct Evaluation {
  const Scalar<V>* a;
  int64_t r;
  const V *c, *z;
  V *image, *residual, *turn;  // f(z), f(z) - z and act'
  V scale, residual_square, image_square;
};

template <Activation kActivation, bool kTurn, class V>
void evaluate(Evaluation<V>& e) {
  affine(e.a, e.r, e.c, e.z, e.image);
  const V scale = e.scale;
  V g_square{}, f_square{};
  for (int64_t i = 0; i < e.r; ++i) {
    V turn;
    const V f = activate<kActivation>(e.image[i], turn);
    const V g = f - e.z[i];
    e.image[i] = f;
    e.residual[i] = g;
    if constexpr (kTurn) e.turn[i] = turn;
    g_square += (g * scale) * (g * scale);
    f_square += (f * scale) * (f * scale);
  }
  e.residual_square = g_square;
  e.image_square = f_square;
}

template <bool kTurn, class V>
auto evaluator(Activation activation) -> void (*)(Evaluation<V>&) {
  switch (activation) {
    case Activation::kRelu: return evaluate<Activation::kRelu, kTurn, V>;
    case Activation::kGelu: return evaluate<Activation::kGelu, kTurn, V>;
    case Activation::kSilu: return evaluate<Activation::kSilu, kTurn, V>;
    case Activation::kSigmoid: return evaluate<Activation::kSigmoid, kTurn, V>;
    case Activation::kLeakyRelu: return evaluate<Activation::kLeakyRelu, kTurn, V>;
    default: return evaluate<Activation::kTanh, kTurn, V>;
  }
}

// One row of m into a lane of `to`.
template <class V>
void load_lane(DType dtype, const Matrix& m, int64_t row, int64_t r, int lane, V* to) {
  with_type(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(untag(tag));
    if constexpr (sizeof(wide_t<T>) == sizeof(Scalar<V>)) {
      const T* from = static_cast<const T*>(m.data) + row * m.row_stride;
      Scalar<V>* out = reinterpret_cast<Scalar<V>*>(to) + lane;
      for (int64_t i = 0; i < r; ++i) out[i * kCount<V>] = to_float(from[i * m.col_stride]);
    }
    return 0;
  });
}
// A lane of `from` into a closed row.
template <class V>
void store_lane(DType dtype, const V* from, int lane, int64_t row, int64_t r, void* to) {
  with_type(dtype, [&](auto tag) __attribute__((always_inline)) {
    using T = decltype(untag(tag));
    if constexpr (sizeof(wide_t<T>) == sizeof(Scalar<V>)) {
      T* out = static_cast<T*>(to) + row * r;
      const Scalar<V>* in = reinterpret_cast<const Scalar<V>*>(from) + lane;
      for (int64_t i = 0; i < r; ++i) out[i] = narrow<T>(in[i * kCount<V>]);
    }
    return 0;
  });
}

template <class V>
PPMOE_INLINE V* take(char*& scratch, int64_t vectors) {
  V* const taken = reinterpret_cast<V*>(scratch);
  scratch += vectors * static_cast<int64_t>(sizeof(V));
  return taken;
}

// The rows of a solve. A lane that is done takes the next row, so that a row that needs many steps
// costs the others none.
template <class V>
struct Rows {
  static constexpr int kVectors = 5;  // times r, of scratch

  const Solve& p;
  int64_t next, end;
  int64_t now = 0;      // evaluations
  int64_t soonest = 0;  // when a row has had all of its own
  uint32_t running = 0;
  uint32_t fresh = 0;  // whose first evaluation is the next, or was the last
  int64_t row[kCount<V>], started[kCount<V>];
  V *c, *z, *image, *residual, *best;
  V scale{}, limit{}, norm{}, best_norm{};
  Mask<V> rescaled{};  // lanes where what was kept is in another scale

  Rows(const Solve& solve, int64_t first, int64_t count, char*& scratch)
      : p(solve), next(first), end(first + count) {
    c = take<V>(scratch, p.r), z = take<V>(scratch, p.r), image = take<V>(scratch, p.r);
    residual = take<V>(scratch, p.r), best = take<V>(scratch, p.r);
    if (count < kCount<V>) {
      for (int64_t i = 0; i < p.r; ++i) c[i] = z[i] = V{};
    }
    scale += 1;
    fill();
  }

  // Gives idle lanes their next rows.
  void fill() {
    fresh = 0;
    for (int lane = 0; lane < kCount<V> && next < end; ++lane) {
      if (has(running, lane)) continue;
      row[lane] = next++;
      started[lane] = now;
      load_lane(p.dtype, p.c, row[lane], p.r, lane, c);
      if (p.x0.data != nullptr) load_lane(p.dtype, p.x0, row[lane], p.r, lane, z);
      fresh |= uint32_t{1} << lane;
    }
    if (p.x0.data == nullptr) {
      const Mask<V> first = mask_of<V>(fresh);
      for (int64_t i = 0; i < p.r; ++i) z[i] = first ? V{} : z[i];
    }
    running |= fresh;
    soonest = INT64_MAX;
    for (int lane = 0; lane < kCount<V>; ++lane) {
      if (has(running, lane) && started[lane] + p.max_iter < soonest) {
        soonest = started[lane] + p.max_iter;
      }
    }
  }

  // As `fill`, but only for many lanes at once: the first steps of a row are cheap together.
  void refill() {
    fresh = 0;
    const int idle = kCount<V> - __builtin_popcount(running);
    if (next < end && 4 * idle >= kCount<V>) fill();
  }

  // Chooses the scale of lanes anew, and what is measured with it.
  void measure(const Mask<V>& lanes, bool first, V& g_square, V& f_square) {
    V top{};
    for (int64_t i = 0; i < p.r; ++i) {
      const V f = magnitude(image[i]), from = magnitude(z[i]);
      top = f > top ? f : top;
      top = from > top ? from : top;
    }
    const V near = power_near(top);
    if (!first) {
      limit = lanes ? limit / scale * near : limit;
      best_norm = lanes ? best_norm / scale * near : best_norm;
    }
    scale = lanes ? near : scale;
    V g{}, f{}, from{};
    for (int64_t i = 0; i < p.r; ++i) {
      g += (residual[i] * scale) * (residual[i] * scale);
      f += (image[i] * scale) * (image[i] * scale);
      from += (z[i] * scale) * (z[i] * scale);
    }
    g_square = lanes ? g : g_square;
    f_square = lanes ? f : f_square;
    if (first) {
      limit = lanes ? Scalar<V>(1e4) * (root(from) + root(f)) : limit;
      best_norm = lanes ? V{} + Scalar<V>(__builtin_inf()) : best_norm;
    }
  }

  // Judges an evaluation: keeps the best, and ends the rows that are done. A row that only tries a
  // point (`trial`) does not diverge there.
  void observe(V g_square, V f_square, const Mask<V>& trial) {
    const Mask<V> run = mask_of<V>(running), first = mask_of<V>(fresh);
    ++now;
    if (fresh != 0) measure(first, true, g_square, f_square);
    rescaled = run & (g_square + f_square < Scalar<V>(0x1p-40));
    if (some(rescaled)) measure(rescaled, false, g_square, f_square);
    norm = root(g_square);
    const Mask<V> better = run & (norm < best_norm), keep = better | first;
    best_norm = better ? norm : best_norm;
    for (int64_t i = 0; i < p.r; ++i) best[i] = keep ? image[i] : best[i];
    const Mask<V> diverged = run & ~(norm <= limit) & ~trial;
    const Mask<V> converged = norm <= scale * static_cast<Scalar<V>>(p.atol) +
                                          root(f_square) * static_cast<Scalar<V>>(p.rtol);
    uint32_t done = bits_of(run & (converged | diverged));
    if (now >= soonest) {
      for (int lane = 0; lane < kCount<V>; ++lane) {
        if (has(running, lane) && now - started[lane] >= p.max_iter) done |= uint32_t{1} << lane;
      }
    }
    if (done != 0) finish(done, bits_of(diverged));
  }

  void finish(uint32_t done, uint32_t diverged) {
    for (int lane = 0; lane < kCount<V>; ++lane) {
      if (!has(done, lane)) continue;
      store_lane(p.dtype, best, lane, row[lane], p.r, p.x);
      p.steps[row[lane]] = static_cast<int32_t>(now - started[lane]);
      static_cast<Scalar<V>*>(p.residual)[row[lane]] =
          has(diverged, lane) ? Scalar<V>(__builtin_inf()) : best_norm[lane] / scale[lane];
    }
    running &= ~done;
  }
};

}  // namespace
}  // namespace ppmoe::cell::PPMOE_ISA
