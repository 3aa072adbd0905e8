// slice_rows and merge_rows and their gradients: copies and weighted sums of whole rows.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

PPMOE_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes && at < 512; at += 64) __builtin_prefetch(row + at);
}

// Stores that skip the caches: nothing reads a result of this size back from them, and the memory
// need not be read before it is written.
PPMOE_INLINE void stream64(char* to, VecI v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  __m256i half[2];
  __builtin_memcpy(half, &v, 64);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half[0]);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), half[1]);
#else
  store(to, v);
#endif
}

PPMOE_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

PPMOE_INLINE bool aligned64(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 63) == 0; }

// Copies one row (null: zeros).
PPMOE_INLINE void put_row(char* to, const char* from, int64_t bytes, bool stream) {
  if (!stream || !aligned64(to)) {
    from != nullptr ? __builtin_memcpy(to, from, static_cast<size_t>(bytes))
                    : __builtin_memset(to, 0, static_cast<size_t>(bytes));
    return;
  }
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) stream64(to + at, from ? load<VecI>(from + at) : VecI{});
  for (; at < bytes; ++at) to[at] = from ? from[at] : 0;
}

// Writes 64 bytes' worth of accumulators, through the caches or past them.
template <class T>
PPMOE_INLINE void put_block(T* to, const WideVec<T>* v, bool stream) {
  constexpr int lanes = kWideLanes<T>;
  constexpr int vectors = static_cast<int>(sizeof(wide_t<T>) / sizeof(T));
  alignas(64) T block[vectors * lanes];
#pragma GCC unroll 2
  for (int i = 0; i < vectors; ++i) store_wide(block + i * lanes, v[i]);
  const VecI bits = load<VecI>(block);
  stream ? stream64(reinterpret_cast<char*>(to), bits) : store(to, bits);
}

template <class T>
void merge_tokens(const Merge& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  constexpr int vectors = static_cast<int>(sizeof(W) / sizeof(T));  // one block is 64 bytes of T
  constexpr int block = vectors * lanes;
  const T* rows = static_cast<const T*>(a.rows);
  const W* weights = static_cast<const W*>(a.weights);
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * a.width;
    const int32_t* inverse = a.inverse + t * a.top_k;
    const W* weight = weights != nullptr ? weights + t * a.top_k : nullptr;
    const bool stream = a.stream && aligned64(out);
    int64_t i = 0;
    for (; i + block <= a.width; i += block) {
      V total[vectors] = {};
      for (int64_t k = 0; k < a.top_k; ++k) {
        if (inverse[k] < 0) continue;
        const T* row = rows + inverse[k] * a.stride + i;
        const W w = weight != nullptr ? weight[k] : W(1);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) total[v] += load_wide(row + v * lanes) * w;
      }
      put_block<T>(out + i, total, stream);
    }
    for (; i < a.width; ++i) {
      W total = 0;
      for (int64_t k = 0; k < a.top_k; ++k) {
        if (inverse[k] < 0) continue;
        total += W(to_float(rows[inverse[k] * a.stride + i])) * (weight ? weight[k] : W(1));
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
    const bool stream = a.stream && aligned64(out);
    const T* grad = static_cast<const T*>(a.grad) + slot / a.top_k * a.grad_stride;
    const T* rows = static_cast<const T*>(a.rows) + row * a.stride;
    const W weight = weights[slot];
    V dot[vectors] = {};
    int64_t i = 0;
    for (; i + block <= a.width; i += block) {
      V scaled[vectors];
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
  const char* x = static_cast<const char*>(a.x);
  char* out = static_cast<char*>(a.out);
  const int64_t stride = a.stride * a.element_bytes;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t slot = a.slots[i];
    if (i + 1 < end && a.slots[i + 1] >= 0) {
      prefetch_row(x + a.slots[i + 1] / a.top_k * stride, a.row_bytes);
    }
    put_row(out + i * a.row_bytes, slot < 0 ? nullptr : x + slot / a.top_k * stride, a.row_bytes,
            a.stream);
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
