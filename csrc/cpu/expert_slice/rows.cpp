// slice_rows and merge_rows and their gradients: copies and weighted sums of whole rows.
#include "cpu/expert_slice/declare.h"
#include "ppmoe/stream.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

// Copies one row (null: zeros).
PPMOE_INLINE void put_row(char* to, const char* from, int64_t bytes, bool stream) {
  if (bytes == 0) return;  // an empty row may have no address
  if (!stream || !aligned(to)) {
    from != nullptr ? __builtin_memcpy(to, from, static_cast<size_t>(bytes))
                    : __builtin_memset(to, 0, static_cast<size_t>(bytes));
    return;
  }
  int64_t at = 0;
  for (; at + kBytes <= bytes; at += kBytes) {
    stream_vector(to + at, from != nullptr ? load<VecI>(from + at) : VecI{});
  }
  for (; at < bytes; ++at) to[at] = from ? from[at] : 0;
}

// `Blocks` vectors of one token's sum, from element i on.
template <class T, int Blocks>
PPMOE_INLINE void merge_blocks(const Merge& a, const int32_t* inverse, const wide_t<T>* weight,
                               int64_t i, T* out, bool stream) {
  constexpr int lanes = kWideLanes<T>;
  constexpr int vectors = Blocks * static_cast<int>(sizeof(wide_t<T>) / sizeof(T));
  WideVec<T> total[vectors] = {};
  for (int64_t k = 0; k < a.top_k; ++k) {
    if (inverse[k] < 0) continue;
    const T* row = static_cast<const T*>(a.rows) + inverse[k] * a.stride + i;
    const wide_t<T> w = weight != nullptr ? weight[k] : wide_t<T>(1);
    // The rows are many short streams, for which the hardware's prefetcher comes late.
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b)
      __builtin_prefetch(row + (2 * Blocks + b) * (kBytes / sizeof(T)));
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[v] += load_wide(row + v * lanes) * w;
  }
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) {
    put_block<T>(out + i + b * (kBytes / sizeof(T)), total + b * (vectors / Blocks), stream);
  }
}

template <class T>
void merge_tokens(const Merge& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  constexpr int64_t block = kBytes / sizeof(T);
  const W* weights = static_cast<const W*>(a.weights);
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * a.width;
    const int32_t* inverse = a.inverse + t * a.top_k;
    const W* weight = weights != nullptr ? weights + t * a.top_k : nullptr;
    const bool stream = a.stream && aligned(out);
    int64_t i = 0;
    for (; i + 4 * block <= a.width; i += 4 * block) {
      merge_blocks<T, 4>(a, inverse, weight, i, out, stream);
    }
    for (; i + block <= a.width; i += block) {
      merge_blocks<T, 1>(a, inverse, weight, i, out, stream);
    }
    for (; i < a.width; ++i) {
      W total = 0;
      for (int64_t k = 0; k < a.top_k; ++k) {
        if (inverse[k] < 0) continue;
        const T value = static_cast<const T*>(a.rows)[inverse[k] * a.stride + i];
        total += W(to_float(value)) * (weight != nullptr ? weight[k] : W(1));
      }
      out[i] = narrow<T>(total);
    }
  }
  if (a.stream) stream_fence();
}

template <class T>
void merge_backward_rows(const MergeBackward& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  constexpr int vectors = static_cast<int>(sizeof(W) / sizeof(T));
  constexpr int block = vectors * lanes;
  const W* weights = static_cast<const W*>(a.weights);
  W* grad_weights = static_cast<W*>(a.grad_weights);
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(a.grad_rows) + row * a.width;
    const int32_t slot = a.slots[row];
    if (slot < 0) {
      put_row(reinterpret_cast<char*>(out), nullptr, a.width * static_cast<int64_t>(sizeof(T)),
              a.stream);
      continue;
    }
    const bool stream = a.stream && aligned(out);
    const T* grad = static_cast<const T*>(a.grad) + slot / a.top_k * a.grad_stride;
    const T* rows = static_cast<const T*>(a.rows) + row * a.stride;
    const W weight = weights[slot];
    V dot[vectors] = {};
    int64_t i = 0;
    for (; i + block <= a.width; i += block) {
      V scaled[vectors];
      __builtin_prefetch(rows + i + 16 * block);
      __builtin_prefetch(grad + i + 16 * block);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const V g = load_wide(grad + i + v * lanes);
        dot[v] += g * load_wide(rows + i + v * lanes);
        scaled[v] = g * weight;
      }
      put_block<T>(out + i, scaled, stream);
    }
    W total = 0;
    for (int v = 0; v < vectors; ++v) total += sum(dot[v]);
    for (; i < a.width; ++i) {
      const W g = to_float(grad[i]);
      total += g * W(to_float(rows[i]));
      out[i] = narrow<T>(g * weight);
    }
    grad_weights[slot] = total;
  }
  if (a.stream) stream_fence();
}

}  // namespace

void slice(const Slice& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const char* row = static_cast<const char*>(a.x) + t * a.stride * a.element_bytes;
    for (int64_t k = 0; k < a.top_k; ++k) {
      const int64_t to = a.inverse[t * a.top_k + k];
      if (to >= 0)
        put_row(static_cast<char*>(a.out) + to * a.row_bytes, row, a.row_bytes, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

void slice_clear(const Slice& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.slots[i] >= 0) continue;
    put_row(static_cast<char*>(a.out) + i * a.row_bytes, nullptr, a.row_bytes, a.stream);
  }
  if (a.stream) stream_fence();
}

void merge(const Merge& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32: return merge_tokens<float>(a, begin, end);
    case DType::kBf16: return merge_tokens<Bf16>(a, begin, end);
    case DType::kF16: return merge_tokens<F16>(a, begin, end);
    case DType::kF64: return merge_tokens<double>(a, begin, end);
  }
}

void merge_backward(const MergeBackward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32: return merge_backward_rows<float>(a, begin, end);
    case DType::kBf16: return merge_backward_rows<Bf16>(a, begin, end);
    case DType::kF16: return merge_backward_rows<F16>(a, begin, end);
    case DType::kF64: return merge_backward_rows<double>(a, begin, end);
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
