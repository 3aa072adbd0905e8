// One block of a matrix product: packed panels and a register-blocked micro-kernel.
//
// a [m, k] and b [k, n] come with any strides and are packed into panels of kMR rows and kNR columns;
// the micro-kernel keeps a kMR x kNR tile of c in registers. The order in which a sum over k is
// taken depends on k alone, so a result does not depend on how c was cut into blocks.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

PPMOE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What a dtype is multiplied as. Bf16 pairs feed the dot-product instruction where there is one;
// float16 and, elsewhere, bfloat16 are widened while packing.
struct Float {
  using Packed = float;
  using Vec = VecF;
  static constexpr int kPair = 1;
};
struct Double {
  using Packed = double;
  using Vec = VecD;
  static constexpr int kPair = 1;
};
struct Bf16Pair {
  using Packed = Bf16;
  using Vec = VecF;
  static constexpr int kPair = 2;
};

template <class T>
struct Scheme {
  using type = Float;
};
template <>
struct Scheme<double> {
  using type = Double;
};
#if defined(__AVX512BF16__)
template <>
struct Scheme<Bf16> {
  using type = Bf16Pair;
};
#endif

#if defined(__AVX512F__)
constexpr int kMR = 12, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kMR = 6, kVectors = 1;
#else
constexpr int kMR = 2, kVectors = 1;
#endif
constexpr int64_t kKC = 512;  // depth of a panel, in elements
constexpr int64_t kMC = 240;  // rows of a that are packed at once

template <class S>
constexpr int kNR = kVectors * static_cast<int>(64 / sizeof(typename S::Vec{}[0]));

template <class S, class T>
PPMOE_INLINE typename S::Packed packed(T x) {
  if constexpr (sizeof(typename S::Packed) == sizeof(T)) {
    return x;
  } else {
    return to_float(x);
  }
}

// Panels of `width` lines of `from` (its rows for a, its columns for b), zero-padded: element
// (line, d) of a panel lies at (d / pair) * width * pair + line * pair + d % pair.
template <class S, class T>
void pack(const T* from, int64_t line_stride, int64_t depth_stride, int64_t lines, int64_t depth,
          int width, typename S::Packed* to) {
  constexpr int pair = S::kPair;
  const int64_t padded = round_up(depth, pair);
  for (int64_t first = 0; first < lines; first += width, to += padded * width) {
    const int here = static_cast<int>(least(width, lines - first));
    const T* base = from + first * line_stride;
    for (int64_t d = 0; d < padded; d += pair) {
      typename S::Packed* cell = to + d * width;
      for (int line = 0; line < width; ++line) {
        for (int p = 0; p < pair; ++p) {
          cell[line * pair + p] = line < here && d + p < depth
                                      ? packed<S>(base[line * line_stride + (d + p) * depth_stride])
                                      : typename S::Packed{};
        }
      }
    }
  }
}

template <class S>
PPMOE_INLINE void multiply_add(const typename S::Packed* a, typename S::Vec b,
                               typename S::Vec& total) {
  if constexpr (S::kPair == 1) {
    total += *a * b;
  } else {
#if defined(__AVX512BF16__)
    int32_t both;
    __builtin_memcpy(&both, a, 4);
    total = reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                    (__m512bh)_mm512_set1_epi32(both),
                                                    (__m512bh)(b)));
#endif
  }
}

// tile [kMR, kNR] (row stride ldt) = or += a panel @ b panel.
template <class S>
void micro(const typename S::Packed* a, const typename S::Packed* b, int64_t steps,
           typename S::Vec* tile, int64_t ldt, bool add) {
  using V = typename S::Vec;
  V total[kMR][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) total[i][j] = add ? tile[i * ldt + j] : V{};
  }
  for (int64_t d = 0; d < steps; ++d) {
    V right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      right[j] = load<V>(reinterpret_cast<const char*>(b) + (d * kVectors + j) * 64);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        multiply_add<S>(a + (d * kMR + i) * S::kPair, right[j], total[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) tile[i * ldt + j] = total[i][j];
  }
}

template <class T, class S>
void store_row(const wide_t<T>* from, const T* bias, int64_t n, T* to) {
  constexpr int lanes = kWideLanes<T>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    WideVec<T> v = load_wide(from + j);
    if (bias != nullptr) v += load_wide(bias + j);
    store_wide(to + j, v);
  }
  for (; j < n; ++j) {
    const wide_t<T> v = bias != nullptr ? from[j] + to_float(bias[j]) : from[j];
    to[j] = narrow<T>(v);
  }
}

template <class S>
struct Buffers {
  int64_t columns, tile, a, b;  // padded n; bytes of the three parts

  explicit Buffers(const Gemm& g) {
    columns = round_up(g.n, kNR<S>);
    const int64_t rows = round_up(least(g.m, kMC), kMR);
    const int64_t depth = round_up(least(g.k, kKC), S::kPair);
    tile = round_up(g.m, kMR) * columns * static_cast<int64_t>(sizeof(typename S::Vec{}[0]));
    a = round_up(rows * depth * static_cast<int64_t>(sizeof(typename S::Packed)), 64);
    b = columns * depth * static_cast<int64_t>(sizeof(typename S::Packed));
  }
};

template <class T>
void run(const Gemm& g, char* scratch) {
  using S = typename Scheme<T>::type;
  using P = typename S::Packed;
  using V = typename S::Vec;
  const Buffers<S> size(g);
  V* tile = reinterpret_cast<V*>(scratch);
  P* a_panels = reinterpret_cast<P*>(scratch + size.tile);
  P* b_panels = reinterpret_cast<P*>(scratch + size.tile + size.a);
  const int64_t ldt = size.columns / (kNR<S> / kVectors);
  const T* a = static_cast<const T*>(g.a.data);
  const T* b = static_cast<const T*>(g.b.data);

  for (int64_t depth = 0; depth < g.k; depth += kKC) {
    const int64_t deep = least(kKC, g.k - depth);
    const int64_t steps = round_up(deep, S::kPair) / S::kPair;
    pack<S>(b + depth * g.b.row_stride, g.b.col_stride, g.b.row_stride, g.n, deep, kNR<S>,
            b_panels);
    for (int64_t row = 0; row < g.m; row += kMC) {
      const int64_t tall = least(kMC, g.m - row);
      pack<S>(a + row * g.a.row_stride + depth * g.a.col_stride, g.a.row_stride, g.a.col_stride,
              tall, deep, kMR, a_panels);
      for (int64_t col = 0; col < size.columns; col += kNR<S>) {
        for (int64_t i = 0; i < tall; i += kMR) {
          micro<S>(a_panels + i * steps * S::kPair, b_panels + col * steps * S::kPair, steps,
                   tile + (row + i) * ldt + col / (kNR<S> / kVectors), ldt, depth != 0);
        }
      }
    }
  }
  const wide_t<T>* values = reinterpret_cast<const wide_t<T>*>(tile);
  if (g.k == 0) __builtin_memset(scratch, 0, static_cast<size_t>(size.tile));
  for (int64_t i = 0; i < g.m; ++i) {
    store_row<T, S>(values + i * size.columns, static_cast<const T*>(g.bias), g.n,
                    static_cast<T*>(g.c) + i * g.ldc);
  }
}

template <class T>
int64_t scratch_bytes(const Gemm& g) {
  const Buffers<typename Scheme<T>::type> size(g);
  return size.tile + size.a + size.b;
}

template <class T>
void sum_columns(const Matrix& x, int64_t m, int64_t n, T* out) {
  constexpr int64_t kWidth = 256;
  wide_t<T> total[kWidth];
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t wide = least(kWidth, n - j);
    for (int64_t c = 0; c < wide; ++c) total[c] = 0;
    for (int64_t i = 0; i < m; ++i) {
      const T* row = static_cast<const T*>(x.data) + i * x.row_stride + j * x.col_stride;
      for (int64_t c = 0; c < wide; ++c) total[c] += to_float(row[c * x.col_stride]);
    }
    store_row<T, Float>(total, nullptr, wide, out + j);
  }
}

}  // namespace

int64_t gemm_scratch(const Gemm& g) {
  switch (g.dtype) {
    case DType::kF32: return scratch_bytes<float>(g);
    case DType::kBf16: return scratch_bytes<Bf16>(g);
    case DType::kF16: return scratch_bytes<F16>(g);
    case DType::kF64: return scratch_bytes<double>(g);
  }
  return 0;
}

void gemm(const Gemm& g, void* scratch) {
  char* bytes = static_cast<char*>(scratch);
  switch (g.dtype) {
    case DType::kF32: return run<float>(g, bytes);
    case DType::kBf16: return run<Bf16>(g, bytes);
    case DType::kF16: return run<F16>(g, bytes);
    case DType::kF64: return run<double>(g, bytes);
  }
}

void column_sums(const Matrix& x, DType dtype, int64_t m, int64_t n, void* out) {
  switch (dtype) {
    case DType::kF32: return sum_columns<float>(x, m, n, static_cast<float*>(out));
    case DType::kBf16: return sum_columns<Bf16>(x, m, n, static_cast<Bf16*>(out));
    case DType::kF16: return sum_columns<F16>(x, m, n, static_cast<F16*>(out));
    case DType::kF64: return sum_columns<double>(x, m, n, static_cast<double*>(out));
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
