// Device side helpers: 16-byte vectors and the accumulation type of every supported dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ppmoe/check.h"

namespace ppmoe {

inline constexpr int kVectorBytes = 16;

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T lane[N];
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class V, class T>
__device__ __forceinline__ V load(const T* from) {
  return *reinterpret_cast<const V*>(from);
}

template <class V, class T>
__device__ __forceinline__ void store(T* to, const V& value) {
  *reinterpret_cast<V*>(to) = value;
}

// The order of the additions is fixed, so the sum has the same bits on every run.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Whether every row of the matrix `tensor` starts and ends on a multiple of `bytes`.
inline bool aligned(const Tensor& tensor, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const auto size = static_cast<int64_t>(tensor.element_size());
  return address % static_cast<uintptr_t>(bytes) == 0 && tensor.stride(0) * size % bytes == 0 &&
         tensor.size(1) * size % bytes == 0;
}

// Calls `body.template operator()<T>()` with the device type of `dtype`, which was checked before.
template <class Body>
void by_dtype(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<__nv_bfloat16>();
    case ScalarType::Half: return body.template operator()<__half>();
    default: return body.template operator()<double>();
  }
}

}  // namespace ppmoe
