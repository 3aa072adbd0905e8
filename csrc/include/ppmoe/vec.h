// Vectors for the CPU kernels: compiler vectors as wide as the registers of the instruction set.
//
// Everything here lives in a namespace of the instruction set it is compiled for. Kernel sources
// include no standard templates: the linker would keep one copy of those, maybe the one with
// instructions that the CPU lacks.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ppmoe/types.h"

#define PPMOE_INLINE static inline __attribute__((always_inline))
#define PPMOE_INLINE_MEMBER inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define PPMOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PPMOE_VECTOR_BYTES 32
#else
#define PPMOE_VECTOR_BYTES 16
#endif

namespace ppmoe::PPMOE_ISA {

inline constexpr int kBytes = PPMOE_VECTOR_BYTES;
inline constexpr int kLanes = kBytes / 4;

typedef float VecF __attribute__((vector_size(PPMOE_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(PPMOE_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(PPMOE_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(PPMOE_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(PPMOE_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(PPMOE_VECTOR_BYTES / 2)));

template <class V>
PPMOE_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
PPMOE_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

PPMOE_INLINE VecF splat(float x) { return x - VecF{}; }

PPMOE_INLINE float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

PPMOE_INLINE Bf16 to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fc0)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

PPMOE_INLINE float to_float(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    // A subnormal is its mantissa times 2^-24, which float32 holds exactly.
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    __builtin_memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}

PPMOE_INLINE F16 to_f16(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {
    // Adding 0.5 aligns the mantissa so that the hardware rounds it to a subnormal's last place.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13))};
#endif
}

PPMOE_INLINE float to_float(float x) { return x; }
PPMOE_INLINE double to_float(double x) { return x; }

// What a dtype is accumulated in, and a vector of that.
template <class T>
struct Wide {
  using type = float;
  using Vec = VecF;
};
template <>
struct Wide<double> {
  using type = double;
  using Vec = VecD;
};
template <class T>
using wide_t = typename Wide<T>::type;
template <class T>
using WideVec = typename Wide<T>::Vec;
template <class T>
inline constexpr int kWideLanes = kBytes / sizeof(wide_t<T>);

template <class T>
struct Tag {};
PPMOE_INLINE float narrow(float x, Tag<float>) { return x; }
PPMOE_INLINE double narrow(double x, Tag<double>) { return x; }
PPMOE_INLINE Bf16 narrow(float x, Tag<Bf16>) { return to_bf16(x); }
PPMOE_INLINE F16 narrow(float x, Tag<F16>) { return to_f16(x); }

// Rounds an accumulated value to the storage dtype T.
template <class T>
PPMOE_INLINE T narrow(wide_t<T> x) {
  return narrow(x, Tag<T>{});
}

// kWideLanes<T> elements, converted to the dtype they are accumulated in.
PPMOE_INLINE VecF load_wide(const float* from) { return load<VecF>(from); }
PPMOE_INLINE VecD load_wide(const double* from) { return load<VecD>(from); }
PPMOE_INLINE VecU widen(VecH v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, VecU);
#endif
}
PPMOE_INLINE VecF load_wide(const Bf16* from) {
  return reinterpret_cast<VecF>(widen(load<VecH>(from)) << 16);
}
PPMOE_INLINE VecF load_wide(const F16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

PPMOE_INLINE void store_wide(float* to, VecF v) { store(to, v); }
PPMOE_INLINE void store_wide(double* to, VecD v) { store(to, v); }
PPMOE_INLINE VecH to_bf16(VecF v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (VecU{} + 0x7fc0u) : rounded;
#if defined(__AVX512F__)
  return reinterpret_cast<VecH>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded)));
#elif defined(__AVX2__)
  // The pack works in halves of its own; the permutation puts their quarters in order.
  const __m256i v32 = reinterpret_cast<__m256i>(rounded);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v32, v32), 0x08);
  return reinterpret_cast<VecH>(_mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(rounded, VecH);
#endif
}
PPMOE_INLINE void store_wide(Bf16* to, VecF v) { store(to, to_bf16(v)); }
PPMOE_INLINE void store_wide(F16* to, VecF v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(to, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_f16(v[i]);
#endif
}

// Lanes i and i + distance exchanged, in each group of 2 * distance lanes.
#if PPMOE_VECTOR_BYTES == 64
PPMOE_INLINE VecF swap_lanes(VecF v, int distance) {
  if (distance == 8) {
    return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  if (distance == 4) {
    return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  }
  if (distance == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  }
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
PPMOE_INLINE VecL swap_lanes(VecL v, int distance) {
  if (distance == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if (distance == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
}
#elif PPMOE_VECTOR_BYTES == 32
PPMOE_INLINE VecF swap_lanes(VecF v, int distance) {
  if (distance == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if (distance == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
}
PPMOE_INLINE VecL swap_lanes(VecL v, int distance) {
  if (distance == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1);
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
}
#else
PPMOE_INLINE VecF swap_lanes(VecF v, int distance) {
  if (distance == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1);
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
}
PPMOE_INLINE VecL swap_lanes(VecL v, int) { return __builtin_shufflevector(v, v, 1, 0); }
#endif

PPMOE_INLINE float sum(VecF v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += swap_lanes(v, distance);
  return v[0];
}
PPMOE_INLINE double sum(VecD v) {
#pragma GCC unroll 3
  for (int distance = kLanes / 4; distance > 0; distance /= 2) {
    v += reinterpret_cast<VecD>(swap_lanes(reinterpret_cast<VecL>(v), distance));
  }
  return v[0];
}

PPMOE_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }

// The largest lane; lanes must not be NaN.
PPMOE_INLINE float largest(VecF v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v = max(v, swap_lanes(v, distance));
  return v[0];
}

// Whether some lane has a bit set.
PPMOE_INLINE bool any(VecI v) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(v);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX2__)
  const __m256i bits = reinterpret_cast<__m256i>(v);
  return _mm256_testz_si256(bits, bits) == 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= v[i];
  return bits != 0;
#endif
}

// 0, 1, 2, ...
PPMOE_INLINE VecI lane_numbers() {
  VecI v;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Words of a and b by turns: those that one unpack instruction takes from the low, or from the
// high, half of each 128 bits.
PPMOE_INLINE VecI unpack_low(VecI a, VecI b) {
#if PPMOE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#elif PPMOE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
PPMOE_INLINE VecI unpack_high(VecI a, VecI b) {
#if PPMOE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif PPMOE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// e^x within 2 ulp for x <= 88; 0 below -87.3; NaN stays. The polynomial is a least-maximum fit of
// (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, error 3e-9.
PPMOE_INLINE VecF exp(VecF x) {
  const VecF clamped = x < -87.3f ? splat(-87.3f) : x;
  const VecF magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = clamped * 1.44269504088896341f + magic;
  const VecF n = shifted - magic;
  const VecF r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  VecF q = splat(1.381459879e-03f);
  q = q * r + 8.368716575e-03f;
  q = q * r + 4.166838899e-02f;
  q = q * r + 1.666652113e-01f;
  q = q * r + 4.999999404e-01f;
  const VecF p = q * (r * r) + r + 1.f;
  const VecI exponent = reinterpret_cast<VecI>(shifted) << 23;
  const VecF scaled = reinterpret_cast<VecF>(reinterpret_cast<VecI>(p) + exponent);
  const VecF result = x < -87.3f ? VecF{} : scaled;
  return x == x ? result : x;
}

template <class T>
T untag(Tag<T>);

// Calls body with a Tag of the storage type.
template <class F>
PPMOE_INLINE auto with_type(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kBf16: return body(Tag<Bf16>{});
    case DType::kF16: return body(Tag<F16>{});
    case DType::kF64: return body(Tag<double>{});
    case DType::kF32: break;
  }
  return body(Tag<float>{});
}

}  // namespace ppmoe::PPMOE_ISA
