// What the kernels of route share: arguments, the order of scores as integers, warp reductions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ppmoe/vector.cuh"

namespace ppmoe {

inline constexpr double kSigmoidSumFloor = 1e-20;
inline constexpr unsigned kEveryLane = 0xffffffffu;

enum class LogitType { kFloat, kBFloat16, kHalf, kDouble };

struct RouteArgs {
  const void* logits;  // [T, E], rows at any distance
  int64_t stride;
  LogitType type;
  const void* bias;  // [E] in the dtype of the weights, or null
  void* weights;     // [T, K]
  int* ids;          // [T, K]
  int64_t tokens;
  int experts;
  int top_k;
  int groups;
  int top_groups;
  int group_size;
  double scale;
  bool softmax;
  bool renormalize;
  bool by_logit;     // the order is that of the logits and not of score + bias
  bool vector_rows;  // a lane's logits can be read in vectors
  bool vector_bias;
  int group_lanes;  // lanes that read one group together, a power of two
  void* scratch;    // route_any_kernel with groups: 2 * groups values a warp
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }
__device__ __forceinline__ float smaller(float x, float y) { return fminf(x, y); }
__device__ __forceinline__ double smaller(double x, double y) { return fmin(x, y); }

template <class W>
__device__ __forceinline__ W infinity() {
  return static_cast<W>(HUGE_VAL);
}

// 1 / x for a sum of exponentials, which lies between 1 and E or is NaN: without the special cases
// of a division, whose calls cost registers.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.f, x); }
__device__ __forceinline__ double reciprocal(double x) {
  double y = __fdividef(1.f, static_cast<float>(x));
  y *= 2 - x * y;
  y *= 2 - x * y;
  return y * (2 - x * y);
}

// The logistic function, right down to its subnormal results.
template <class W>
__device__ __forceinline__ W logistic(W x) {
  const W e = exponential(x < 0 ? x : -x);
  return (x < 0 ? e : W(1)) * reciprocal(1 + e);
}

template <class To, class From>
__device__ __forceinline__ To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// An unsigned integer with the order of x: NaN as -inf, -0 as +0. None is 0, which therefore stands
// for "no expert here".
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = bits_of<uint32_t>(x == x ? x + 0.f : -infinity<float>());
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float from_order(uint32_t order) {
  return bits_of<float>(order ^ (order >> 31 ? 0x80000000u : 0xffffffffu));
}

// Reductions over the kLanes lanes that share a token; every lane gets the result. A whole warp has
// an instruction for integers, which is one where shuffles are ten.
template <int kLanes>
struct Reduce {
  static __device__ __forceinline__ uint32_t max(uint32_t x) {
    if constexpr (kLanes == 32) {
      return __reduce_max_sync(kEveryLane, x);
    } else {
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        const uint32_t other = __shfl_xor_sync(kEveryLane, x, step);
        x = other > x ? other : x;
      }
      return x;
    }
  }

  // The larger half first, then the other half among the lanes that have it.
  static __device__ __forceinline__ uint64_t max(uint64_t x) {
    const auto high = static_cast<uint32_t>(x >> 32);
    const uint32_t most = max(high);
    const uint32_t low = max(high == most ? static_cast<uint32_t>(x) : 0u);
    return static_cast<uint64_t>(most) << 32 | low;
  }

  template <class W>
  static __device__ __forceinline__ W sum(W x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
    return x;
  }

  static __device__ __forceinline__ bool any(bool x) {
    const unsigned votes = __ballot_sync(kEveryLane, x);
    if constexpr (kLanes == 32) {
      return votes != 0;
    } else {
      const unsigned first = threadIdx.x % 32 / kLanes * kLanes;
      return (votes >> first & ((1u << kLanes) - 1)) != 0;
    }
  }
};

// Batcher's odd-even merge sort, descending; the loops vanish, so that keys stay in registers.
template <class Key, int N>
__device__ __forceinline__ void sort_keys(Key (&key)[N]) {
#pragma unroll
  for (int p = 1; p < N; p *= 2) {
#pragma unroll
    for (int k = p; k >= 1; k /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool lower = i >= k % p && (i - k % p) / k % 2 == 0 && i + k < N;
        if (lower && i / (2 * p) == (i + k) / (2 * p)) {
          const bool swap = key[i] < key[i + k];
          const Key high = swap ? key[i + k] : key[i];
          key[i + k] = swap ? key[i] : key[i + k];
          key[i] = high;
        }
      }
    }
  }
}

}  // namespace ppmoe
