// The rows of a branch before and after its attention: norm and projections, and back.
#include "cpu/ladder_attention/rows.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

template <class T>
PPMOE_INLINE Weights<T> weights_of(const void* data, int64_t outputs, int64_t depth) {
  return {static_cast<Packed<T>*>(const_cast<void*>(data)), outputs, depth};
}

// Outputs begin to end of a weight's gradient as one block product.
Gemm gemm_of(const WeightGradient& g, int64_t begin, int64_t end) {
  const int64_t left = packed_stride(g.dtype, g.outputs), right = packed_stride(g.dtype, g.inputs);
  const int64_t size = g.dtype == DType::kF64 ? 8 : g.dtype == DType::kF32 ? 4 : 2;
  return {{static_cast<const char*>(g.left) + begin * size, 1, left},
          {g.right, right, 1},
          static_cast<char*>(g.out) + begin * g.inputs * size,
          g.inputs,
          nullptr,
          g.dtype,
          end - begin,
          g.inputs,
          g.tokens,
          g.outputs,
          false};
}

template <class T>
struct InScratch {
  using W = wide_t<T>;
  int64_t tile, row, normed, scaled, bytes;  // in bytes

  explicit InScratch(const BranchIn& b) {
    int64_t at = 0;
    const auto take = [&](int64_t count, size_t size) {
      const int64_t here = at;
      at += round_up(count * static_cast<int64_t>(size), 64);
      return here;
    };
    const int64_t widest = padded_columns<T>(b.outputs > b.channels ? b.outputs : b.channels);
    tile = take(kRowBlock * widest, sizeof(W));
    row = take(padded_columns<T>(b.channels), sizeof(W));
    normed = take(kRowBlock * packed_depth<T>(b.channels), sizeof(Packed<T>));
    scaled = 0;
    bytes = at;
  }
};

// rows of `to` = tile + bias. Rows of the tile, and the bias, hold whole vectors.
template <class T>
PPMOE_INLINE void put_rows(const wide_t<T>* tile, int64_t ldt, int64_t rows, const void* bias,
                           int64_t n, Packed<T>* to) {
  using W = wide_t<T>;
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const W* const add = static_cast<const W*>(bias);
  const int64_t stride = packed_depth<T>(n);
  for (int64_t i = 0; i < rows; ++i, tile += ldt, to += stride) {
    const auto sum = [&](int64_t j) __attribute__((always_inline)) {
      return add != nullptr ? load<V>(tile + j) + load<V>(add + j) : load<V>(tile + j);
    };
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) put(to + j, sum(j));
    if (j < n) store_part(to + j, sum(j), n - j);
    for (j = n; j < stride; ++j) to[j] = Packed<T>{};
  }
}

template <class T>
void run_in(const BranchIn& b, int64_t first, int64_t rows, char* scratch) {
  using W = wide_t<T>;
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const InScratch<T> at(b);
  W* const tile = reinterpret_cast<W*>(scratch + at.tile);
  W* const row = reinterpret_cast<W*>(scratch + at.row);
  const int64_t stride = packed_depth<T>(b.channels);
  Packed<T>* const normed = b.normed != nullptr ? static_cast<Packed<T>*>(b.normed) + first * stride
                                                : reinterpret_cast<Packed<T>*>(scratch + at.normed);
  for (int64_t i = 0; i < rows; ++i) {
    const T* const x = pixel<const T>(b.x, b.height, b.width, first + i);
    widen_row(x, b.x.channel, b.channels, row);
    standardise(row, b.channels, b.eps);
    for (int64_t j = 0; j < b.channels; j += lanes) {
      store(row + j, load<V>(row + j) * load<V>(static_cast<const W*>(b.ln_w) + j) +
                         load<V>(static_cast<const W*>(b.ln_b) + j));
    }
    put_packed<T>(row, b.channels, normed + i * stride);
  }
  const Weights<T> weights = weights_of<T>(b.weights, b.outputs, b.channels);
  const int64_t ldt = padded_columns<T>(b.outputs);
  linear(normed, stride, rows, weights, tile, ldt);
  put_rows<T>(tile, ldt, rows, b.bias, b.outputs,
              static_cast<Packed<T>*>(b.out) + first * packed_depth<T>(b.outputs));
  if (b.v_rows != nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      widen_row(pixel<const T>(b.v, b.height, b.width, first + i), b.v.channel, b.channels, row);
      put_packed<T>(row, b.channels, static_cast<Packed<T>*>(b.v_rows) + (first + i) * stride);
    }
  }
  if (b.out_weights == nullptr) return;
  Packed<T>* const scaled = static_cast<Packed<T>*>(b.scaled) + first * stride;
  for (int64_t i = 0; i < rows; ++i) {
    widen_row(pixel<const T>(b.grad, b.height, b.width, first + i), b.grad.channel, b.channels,
              row);
    const W scale = scale_of<W>(b.row_scale, b.height * b.width, first + i);
    for (int64_t j = 0; j < b.channels; j += lanes) store(row + j, load<V>(row + j) * scale);
    put_packed<T>(row, b.channels, scaled + i * stride);
  }
  const int64_t narrow = padded_columns<T>(b.channels);
  linear(scaled, stride, rows, weights_of<T>(b.out_weights, b.channels, b.channels), tile, narrow);
  put_rows<T>(tile, narrow, rows, nullptr, b.channels,
              static_cast<Packed<T>*>(b.grad_attention) + first * stride);
}

template <class T>
void run_out(const BranchOut& b, int64_t first, int64_t rows, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const int64_t stride = packed_depth<T>(b.channels), ldt = padded_columns<T>(b.channels);
  W* const tile = scratch;
  W* const row = scratch + kRowBlock * ldt;
  W* const more = row + ldt;
  const Packed<T>* const attended = static_cast<const Packed<T>*>(b.attended) + first * stride;
  linear(attended, stride, rows, weights_of<T>(b.weights, b.channels, b.channels), tile, ldt);
  for (int64_t i = 0; i < rows; ++i) {
    widen_row(pixel<const T>(b.x, b.height, b.width, first + i), b.x.channel, b.channels, row);
    if (b.normed != nullptr) {
      const Packed<T>* const normed = static_cast<const Packed<T>*>(b.normed);
      widen_row(normed + (first + i) * stride, 1, b.channels, more);
    }
    const W scale = scale_of<W>(b.row_scale, b.height * b.width, first + i);
    for (int64_t j = 0; j < b.channels; j += lanes) {
      V value = load<V>(tile + i * ldt + j) + load<V>(static_cast<const W*>(b.bias) + j);
      if (b.normed != nullptr) value += load<V>(more + j);
      store(row + j, load<V>(row + j) + value * scale);
    }
    narrow_row<T>(row, b.channels, pixel<T>(b.out, b.height, b.width, first + i), b.out.channel);
  }
}

template <class T>
void run_in_backward(const BranchInBackward& b, int64_t first, int64_t rows, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const int64_t ldt = padded_columns<T>(b.channels), stride = packed_depth<T>(b.channels);
  const int64_t deep = packed_depth<T>(b.inputs);
  W* const tile = scratch;
  W* const row = scratch + kRowBlock * ldt;
  W* const more = row + ldt;
  W* const sums = static_cast<W*>(b.sums);
  const Packed<T>* const grad_in = static_cast<const Packed<T>*>(b.grad_in) + first * deep;
  linear(grad_in, deep, rows, weights_of<T>(b.weights, b.channels, b.inputs), tile, ldt);
  for (int64_t i = 0; i < rows; ++i) {
    W* const grad = tile + i * ldt;
    widen_row(pixel<const T>(b.x, b.height, b.width, first + i), b.x.channel, b.channels, row);
    const V inverse = standardise(row, b.channels, b.eps) - V{};
    if (b.scaled != nullptr) {
      const Packed<T>* const scaled = static_cast<const Packed<T>*>(b.scaled);
      widen_row(scaled + (first + i) * stride, 1, b.channels, more);
      for (int64_t j = 0; j < b.channels; j += lanes) {
        store(grad + j, load<V>(grad + j) + load<V>(more + j));
      }
    }
    V level = V{}, slope = V{};
    for (int64_t j = 0; j < b.channels; j += lanes) {
      const V each = load<V>(grad + j), normed = load<V>(row + j);
      if (sums != nullptr) {
        store(sums + j, load<V>(sums + j) + each * normed);
        store(sums + b.sums_stride + j, load<V>(sums + b.sums_stride + j) + each);
      }
      // The norm's weights end in zeros, and so does what is summed here.
      const V weighted = each * load<V>(static_cast<const W*>(b.ln_w) + j);
      store(grad + j, weighted);
      level += weighted;
      slope += weighted * normed;
    }
    if (b.grad_x.data == nullptr) continue;
    const V mean = sum(level) / static_cast<W>(b.channels) - V{};
    const V tilt = sum(slope) / static_cast<W>(b.channels) - V{};
    widen_row(pixel<const T>(b.grad, b.height, b.width, first + i), b.grad.channel, b.channels,
              more);
    for (int64_t j = 0; j < b.channels; j += lanes) {
      const V change = (load<V>(grad + j) - mean - load<V>(row + j) * tilt) * inverse;
      store(more + j, load<V>(more + j) + change);
    }
    narrow_row<T>(more, b.channels, pixel<T>(b.grad_x, b.height, b.width, first + i),
                  b.grad_x.channel);
  }
}

// Outputs begin to end of left^T @ right. Sums of wide elements run over the tokens in memory as
// they are, a part at a time that stays in the caches; pairs are packed first.
template <class T>
void run_weight_gradient(const WeightGradient& g, int64_t begin, int64_t end, void* scratch) {
  using P = Packed<T>;
  using W = wide_t<T>;
  constexpr int64_t kPart = 256;
  const int64_t left = packed_depth<T>(g.outputs), right = packed_depth<T>(g.inputs);
  const P* const rows = static_cast<const P*>(g.left) + begin;
  const P* const columns = static_cast<const P*>(g.right);
  T* const out = static_cast<T*>(g.out) + begin * g.inputs;
  if constexpr (sizeof(P) == sizeof(W)) {
    using S = typename Scheme<W>::type;
    constexpr int lanes = kWideVector<W>;
    const int64_t ldt = round_up(g.inputs, lanes);
    W* const tile = static_cast<W*>(scratch);
    for (int64_t t = 0; t < g.tokens || t == 0; t += kPart) {
      multiply<S>({rows + t * left, 1, left}, end - begin, {columns + t * right, right},
                  ldt / lanes, least(kPart, g.tokens - t), tile, ldt, t != 0);
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      narrow_row<T>(tile + i * ldt, g.inputs, out + i * g.inputs, 1);
    }
  } else {
    gemm(gemm_of(g, begin, end), scratch);
  }
}

// Calls run(first row, rows) for blocks of a range of rows.
template <class F>
PPMOE_INLINE void in_blocks(int64_t begin, int64_t end, const F& run) {
  for (int64_t row = begin; row < end; row += kRowBlock) run(row, least(kRowBlock, end - row));
}

}  // namespace

int64_t branch_in_scratch(const BranchIn& b) {
  return with_type(b.dtype, [&](auto tag) { return InScratch<decltype(untag(tag))>(b).bytes; });
}

void branch_in(const BranchIn& b, int64_t begin, int64_t end, void* scratch) {
  with_type(b.dtype, [&](auto tag) {
    in_blocks(begin, end, [&](int64_t row, int64_t rows) {
      run_in<decltype(untag(tag))>(b, row, rows, static_cast<char*>(scratch));
    });
  });
}

int64_t branch_out_scratch(const BranchOut& b) {
  return with_type(b.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return (kRowBlock + 2) * padded_columns<T>(b.channels) *
           static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void branch_out(const BranchOut& b, int64_t begin, int64_t end, void* scratch) {
  with_type(b.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    in_blocks(begin, end, [&](int64_t row, int64_t rows) {
      run_out<T>(b, row, rows, static_cast<wide_t<T>*>(scratch));
    });
  });
}

int64_t branch_in_backward_scratch(const BranchInBackward& b) {
  return with_type(b.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return (kRowBlock + 2) * padded_columns<T>(b.channels) *
           static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void branch_in_backward(const BranchInBackward& b, int64_t begin, int64_t end, void* scratch) {
  with_type(b.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    in_blocks(begin, end, [&](int64_t row, int64_t rows) {
      run_in_backward<T>(b, row, rows, static_cast<wide_t<T>*>(scratch));
    });
  });
}

int64_t weight_gradient_scratch(const WeightGradient& g) {
  return with_type(g.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    if constexpr (sizeof(Packed<T>) != sizeof(wide_t<T>)) {
      return gemm_scratch(gemm_of(g, 0, least(kRowBlock, g.outputs)));
    }
    return kRowBlock * padded_columns<T>(g.inputs) * static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void weight_gradient(const WeightGradient& g, int64_t begin, int64_t end, void* scratch) {
  with_type(g.dtype,
            [&](auto tag) { run_weight_gradient<decltype(untag(tag))>(g, begin, end, scratch); });
}

DType packed_dtype(DType dtype) {
  return with_type(dtype, [](auto tag) {
    using P = Packed<decltype(untag(tag))>;
    if constexpr (sizeof(P) == 8) return DType::kF64;
    return sizeof(P) == 2 ? DType::kBf16 : DType::kF32;
  });
}

int64_t packed_stride(DType dtype, int64_t n) {
  return with_type(dtype, [&](auto tag) { return packed_depth<decltype(untag(tag))>(n); });
}

int64_t weight_bytes(DType dtype, int64_t outputs, int64_t depth) {
  return with_type(dtype,
                   [&](auto tag) { return Weights<decltype(untag(tag))>::bytes(outputs, depth); });
}

int64_t weight_panels(DType dtype, int64_t outputs) {
  return with_type(
      dtype, [&](auto tag) { return Weights<decltype(untag(tag))>{nullptr, outputs, 0}.panels(); });
}

void pack_weights(DType dtype, const void* w, int64_t row, int64_t column, int64_t outputs,
                  int64_t depth, int64_t begin, int64_t end, void* to) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const Weights<T> weights = weights_of<T>(to, outputs, depth);
    const Lines<T> lines{static_cast<const T*>(w), {row}, {column}};
    for (int64_t i = begin; i < end; ++i) weights.pack(i, lines);
  });
}

// Sums of chunks or other wide elements, to a dtype and back.
void narrow_elements(DType dtype, const void* from, int64_t n, void* to) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const wide_t<T>* const wide = static_cast<const wide_t<T>*>(from);
    for (int64_t j = 0; j < n; ++j) static_cast<T*>(to)[j] = narrow<T>(wide[j]);
  });
}

void widen_elements(DType dtype, const void* from, int64_t stride, int64_t n, void* to) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    wide_t<T>* const wide = static_cast<wide_t<T>*>(to);
    for (int64_t j = 0; j < n; ++j) wide[j] = to_float(static_cast<const T*>(from)[j * stride]);
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
