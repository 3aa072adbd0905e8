// Gradients of the weights of pixel_adaptive_fusion, as products of rows, and of its biases.
#include "cpu/ladder_attention/fusion.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

constexpr int64_t kTokens = 128;  // rows that are multiplied in one go: a panel stays in the caches

// Sums of columns: eight rows in a tree, and these sums in double.
template <class T>
void sum_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, T* out) {
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  for (int64_t j = 0; j < columns; j += lanes) {
    const int64_t left = least(lanes, columns - j);
    double total[lanes] = {};
    for (int64_t i = 0; i < rows; i += 8) {
      V part[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        part[r] = i + r < rows ? load_first(x + (i + r) * stride + j, left) : V{};
      }
#pragma GCC unroll 3
      for (int apart = 4; apart > 0; apart /= 2) {
#pragma GCC unroll 4
        for (int r = 0; r < apart; ++r) part[r] += part[r + apart];
      }
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) total[lane] += part[0][lane];
    }
    for (int64_t lane = 0; lane < left; ++lane) {
      out[j + lane] = narrow<T>(static_cast<wide_t<T>>(total[lane]));
    }
  }
}

// Rows of dtype as a product over them takes them: a step is a row, or a pair of rows zipped.
template <class T>
void stage_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, Packed<T>* to,
                int64_t pitch) {
  using S = typename Scheme<T>::type;
  constexpr int64_t width = kColumns<S>;
  const Lines<T> lines{from, {1}, {stride}};
  for (int64_t i = 0; i < rows; i += S::kPair) {
    for (int64_t j = 0; j < columns; j += width) {
      pack_panel<S, width>(lines.from(j, i), columns - j, least(S::kPair, rows - i),
                           to + i * pitch + j * S::kPair);
    }
  }
}

// Whether rows can be multiplied where they lie.
template <class T>
bool in_place(const FusionGradient& g, bool right) {
  if constexpr (sizeof(T) != sizeof(wide_t<T>)) return false;
  return !right || g.padded || g.inputs % kColumns<typename Scheme<T>::type> == 0;
}

template <class T>
struct GradientScratch {
  int64_t tile, left, right;  // bytes

  explicit GradientScratch(const FusionGradient& g) {
    const int64_t n = padded_columns<T>(g.inputs);
    tile = g.outputs * n * static_cast<int64_t>(sizeof(wide_t<T>));
    left = in_place<T>(g, false) ? 0 : rows_bytes<T>(kTokens, g.outputs);
    right = in_place<T>(g, true) ? 0 : rows_bytes<T>(kTokens, g.inputs);
  }
};

template <class T>
void run(const FusionGradient& g, char* scratch) {
  using S = typename Scheme<T>::type;
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  const GradientScratch<T> bytes(g);
  const int64_t m = padded_columns<T>(g.outputs), n = padded_columns<T>(g.inputs);
  wide_t<T>* const tile = reinterpret_cast<wide_t<T>*>(scratch);
  Packed<T>* const left_rows = reinterpret_cast<Packed<T>*>(scratch + bytes.tile);
  Packed<T>* const right_rows = reinterpret_cast<Packed<T>*>(scratch + bytes.tile + bytes.left);
  for (int64_t first = 0; first < g.rows || first == 0; first += kTokens) {
    const int64_t rows = least(kTokens, g.rows - first);
    const T* const a = static_cast<const T*>(g.left) + first * g.left_row;
    const T* const b = static_cast<const T*>(g.right) + first * g.right_row;
    Left<S> left{left_rows, S::kPair, m * S::kPair};
    Right<S> right{right_rows, n * S::kPair};
    if constexpr (sizeof(T) == sizeof(wide_t<T>)) left = {a, 1, g.left_row};
    if (!in_place<T>(g, false)) stage_rows<T>(a, g.left_row, rows, g.outputs, left_rows, m);
    if (!in_place<T>(g, true)) {
      stage_rows<T>(b, g.right_row, rows, g.inputs, right_rows, n);
    } else if constexpr (sizeof(T) == sizeof(wide_t<T>)) {
      right = {b, g.right_row};
    }
    multiply(left, g.outputs, right, n / lanes, (rows + S::kPair - 1) / S::kPair, tile, n,
             first != 0);
  }
  for (int64_t i = 0; i < g.outputs; ++i) {
    T* const to = static_cast<T*>(g.out) + i * g.out_row;
    for (int64_t j = 0; j < g.inputs; j += lanes) {
      store_first(to + j, load<V>(tile + i * n + j), g.inputs - j);
    }
  }
}

}  // namespace

void fusion_sums(DType dtype, const void* x, int64_t stride, int64_t rows, int64_t columns,
                 void* out) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    sum_columns<T>(static_cast<const T*>(x), stride, rows, columns, static_cast<T*>(out));
    return 0;
  });
}

int64_t fusion_gradient_scratch(const FusionGradient& g) {
  return with_type(g.dtype, [&](auto tag) {
    const GradientScratch<decltype(untag(tag))> bytes(g);
    return bytes.tile + bytes.left + bytes.right;
  });
}

void fusion_gradient(const FusionGradient& g, void* scratch) {
  with_type(g.dtype, [&](auto tag) {
    run<decltype(untag(tag))>(g, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
