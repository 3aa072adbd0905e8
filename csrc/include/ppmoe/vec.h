// Vectors for the CPU kernels: compiler vectors of 64 bytes, which the compiler splits on narrower
// instruction sets.
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

namespace ppmoe::PPMOE_ISA {

typedef float VecF __attribute__((vector_size(64)));
typedef double VecD __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef int64_t VecL __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));

inline constexpr int kLanes = 16;

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
inline constexpr int kWideLanes = 64 / sizeof(wide_t<T>);

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
PPMOE_INLINE VecF load_wide(const Bf16* from) {
  const VecU bits = __builtin_convertvector(load<VecH>(from), VecU) << 16;
  return reinterpret_cast<VecF>(bits);
}
PPMOE_INLINE VecF load_wide(const F16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(load<__m256i>(from)));
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
  return __builtin_convertvector(rounded, VecH);
}
PPMOE_INLINE void store_wide(Bf16* to, VecF v) { store(to, to_bf16(v)); }
PPMOE_INLINE void store_wide(F16* to, VecF v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_f16(v[i]);
#endif
}

PPMOE_INLINE float sum(VecF v) {
  float total = 0;
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  }
  total = v[0];
  return total;
}
PPMOE_INLINE double sum(VecD v) {
  for (int step = 4; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  }
  return v[0];
}

PPMOE_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }

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

}  // namespace ppmoe::PPMOE_ISA
