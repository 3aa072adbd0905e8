// Stores of whole vectors, through the caches or past them.
#pragma once

#include "ppmoe/vec.h"

namespace ppmoe::PPMOE_ISA {

// Stores that skip the caches: nothing reads a result of this size back from them, and the memory
// need not be read before it is written.
PPMOE_INLINE void stream_vector(char* to, VecI v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(v));
#else
  store(to, v);
#endif
}

PPMOE_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

PPMOE_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kBytes == 0; }

// One vector of T from accumulators, without a detour through memory.
PPMOE_INLINE VecI narrow_block(const VecF* v, Tag<float>) { return reinterpret_cast<VecI>(v[0]); }
PPMOE_INLINE VecI narrow_block(const VecD* v, Tag<double>) { return reinterpret_cast<VecI>(v[0]); }
PPMOE_INLINE VecI join(VecH low, VecH high) {
#if PPMOE_VECTOR_BYTES == 64
  return reinterpret_cast<VecI>(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                        11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                        22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
#elif PPMOE_VECTOR_BYTES == 32
  return reinterpret_cast<VecI>(
      __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  return reinterpret_cast<VecI>(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
#endif
}
PPMOE_INLINE VecI narrow_block(const VecF* v, Tag<Bf16>) {
  return join(to_bf16(v[0]), to_bf16(v[1]));
}
PPMOE_INLINE VecI narrow_block(const VecF* v, Tag<F16>) {
  VecH half[2];
  for (int i = 0; i < 2; ++i) store_wide(reinterpret_cast<F16*>(half + i), v[i]);
  return join(half[0], half[1]);
}

// The same by the conversion that the processor has, which takes subnormal numbers for zero; so do
// its products.
template <class V, class T>
PPMOE_INLINE VecI narrow_products(const V* v, Tag<T> tag) {
  return narrow_block(v, tag);
}
#if defined(__AVX512BF16__)
PPMOE_INLINE VecI narrow_products(const VecF* v, Tag<Bf16>) {
  return (
      VecI)(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(v[1]), reinterpret_cast<__m512>(v[0])));
}
#endif

template <class T>
PPMOE_INLINE void put_block(T* to, const WideVec<T>* v, bool stream) {
  const VecI bits = narrow_block(v, Tag<T>{});
  stream ? stream_vector(reinterpret_cast<char*>(to), bits) : store(to, bits);
}

}  // namespace ppmoe::PPMOE_ISA
