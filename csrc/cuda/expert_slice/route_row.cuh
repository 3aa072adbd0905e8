// route for up to 512 experts and 32 choices: a token's logits stay in the registers of a warp, or
// of a quarter or half of one where there are few experts.
//
// Top-k is K rounds of "largest key of the warp". A lane sorts its own few keys once, so that a
// round looks at one key of every lane and the winner moves its list up. Keys are distinct integers
// (order of the score above, complement of the id below), which makes the choice exact and ties go
// to the lower id. On a whole warp a round costs one REDUX for keys of 32 bits and two for 64, and
// a move per key of a lane; a shuffle tree would cost five shuffles, of a pipe a quarter as wide,
// and five comparisons for every 32 bits, and merging sorted lists across lanes moves all K keys at
// every level. Logits of 16 bits need only 32-bit keys where their own order counts.
#pragma once

#include "route_keys.cuh"

namespace ppmoe {

inline constexpr int kRouteThreads = 128;

__device__ __forceinline__ float widen_bits(uint16_t bits, bool half) {
  return half ? widen(bits_of<__half>(bits)) : widen(bits_of<__nv_bfloat16>(bits));
}

// What a lane holds of its row: experts first to first + N.
template <int N, class T>
__device__ __forceinline__ void load_row(const T* row, int first, int experts, bool vectors,
                                         T (&value)[N]) {
  if (vectors) {
    constexpr int kPiece = N * sizeof(T) < 16 ? N : 16 / static_cast<int>(sizeof(T));
    using V = Vec<T, kPiece>;
#pragma unroll
    for (int at = 0; at < N; at += kPiece) {
      const V piece = first < experts ? load<V>(row + first + at) : V{};
#pragma unroll
      for (int i = 0; i < kPiece; ++i) value[at + i] = piece.lane[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = first + i < experts ? row[first + i] : T{};
  }
}

// 32-bit keys: a 16-bit float has the order of its bits once the sign is seen to.
struct Packed {
  using Key = uint32_t;
  static __device__ __forceinline__ int id(Key key) {
    return static_cast<int>(0xffffu - (key & 0xffffu));
  }
  static __device__ __forceinline__ float value(Key key, bool half) {
    const uint32_t order = key >> 16;
    return widen_bits(static_cast<uint16_t>(order ^ (order >> 15 ? 0x8000u : 0xffffu)), half);
  }
  static __device__ __forceinline__ Key make(uint16_t raw, int id, bool half, bool& nan) {
    const uint32_t infinite = half ? 0x7c00u : 0x7f80u;
    uint32_t bits = raw;
    const bool bad = (bits & 0x7fffu) > infinite;
    nan = nan || bad;
    bits = bad ? infinite | 0x8000u : bits == 0x8000u ? 0u : bits;
    const uint32_t order = bits ^ (bits >> 15 ? 0xffffu : 0x8000u);
    return order << 16 | (0xffffu - static_cast<uint32_t>(id));
  }
};

// 64-bit keys, of logits or of scores.
struct Wide {
  using Key = uint64_t;
  static __device__ __forceinline__ int id(Key key) {
    return static_cast<int>(~static_cast<uint32_t>(key));
  }
  static __device__ __forceinline__ float value(Key key) {
    return from_order(static_cast<uint32_t>(key >> 32));
  }
  static __device__ __forceinline__ Key make(uint32_t order, int id) {
    return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(id);
  }
};

// -inf for every expert outside the groups with the largest sums of their two best keys. `shared`
// holds E keys and two values a group.
template <int kLanes, int N>
__device__ void limit_groups(const RouteArgs& a, int lane, int first, float* shared,
                             float (&key)[N]) {
  const int experts = a.experts;
  const int groups = a.groups;
  const int size = a.group_size;
  float* rank = shared + experts;
  float* chosen = rank + groups;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i < experts) shared[first + i] = key[i];
  }
  __syncwarp();
  const int part = lane % a.group_lanes;
  for (int begin = 0; begin < groups; begin += kLanes / a.group_lanes) {
    const int g = begin + lane / a.group_lanes;
    float best = -infinity<float>();
    float second = best;
    if (g < groups) {
      // Groups start at different places, or their lanes would meet in one bank.
      const int rounds = (size - part + a.group_lanes - 1) / a.group_lanes;
      int at = rounds > 0 ? g % rounds : 0;
      for (int r = 0; r < rounds; ++r) {
        const float x = shared[g * size + part + at * a.group_lanes];
        second = fmaxf(second, fminf(best, x));
        best = fmaxf(best, x);
        at = at + 1 == rounds ? 0 : at + 1;
      }
    }
    for (int step = a.group_lanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kEveryLane, best, step);
      const float other_second = __shfl_xor_sync(kEveryLane, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(best, other));
      best = fmaxf(best, other);
    }
    const float total = size == 1 ? best : best + second;
    if (part == 0 && g < groups) rank[g] = total == total ? total : -infinity<float>();
  }
  __syncwarp();
  for (int g = lane; g < groups; g += kLanes) {
    int better = 0;
    for (int other = 0; other < groups; ++other) {
      better += rank[other] > rank[g] || (rank[other] == rank[g] && other < g);
    }
    chosen[g] = better < a.top_groups ? 1.f : 0.f;
  }
  __syncwarp();
  int group = first / size;
  int inside = first - group * size;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i < experts && chosen[group] == 0.f) key[i] = -infinity<float>();
    inside = inside + 1 == size ? 0 : inside + 1;
    group += inside == 0;
  }
}

// Weights of the chosen logit x, which lanes below top_k hold; highest and total are those of the
// whole row.
template <int kLanes>
__device__ __forceinline__ float weight_of(const RouteArgs& a, int lane, float x, bool poisoned,
                                           float highest, float total) {
  const bool mine = lane < a.top_k;
  const auto scale = static_cast<float>(a.scale);
  float weight;
  if (a.softmax && a.renormalize) {
    // From the selected logits, which is right where the scores underflow.
    highest = from_order(Reduce<kLanes>::max(mine ? order_of(x) : 0u));
    weight = exponential(x - highest);
    total = Reduce<kLanes>::sum(mine ? weight : 0.f);
    return poisoned ? bits_of<float>(0x7fc00000u) : weight * reciprocal(total) * scale;
  }
  if (a.softmax) return exponential(x - highest) * reciprocal(total) * scale;
  weight = logistic(x);
  if (!a.renormalize) return weight * scale;
  total = Reduce<kLanes>::sum(mine ? weight : 0.f);
  return weight / (total + static_cast<float>(kSigmoidSumFloor)) * scale;
}

// The best a.top_k keys of the token, number k in lane k.
template <int kLanes, int N, class Key>
__device__ __forceinline__ Key choose(const RouteArgs& a, int lane, Key (&key)[N]) {
  sort_keys(key);
  Key mine = 0;
  for (int k = 0; k < a.top_k; ++k) {
    const Key best = Reduce<kLanes>::max(key[0]);
    mine = lane == k ? best : mine;
    const bool won = key[0] == best;
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) key[i] = won ? key[i + 1] : key[i];
    key[N - 1] = won ? Key{0} : key[N - 1];
  }
  return mine;
}

// Softmax over logits of 16 bits in the order of the logits.
// Fewest bytes: T*E logits read, 8*T*K written.
template <int kLanes, int N>
__global__ void __launch_bounds__(kRouteThreads) route_packed_kernel(const RouteArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x) / kLanes;
  // Lanes past the end repeat the last token, since their warp needs them.
  const int64_t t = token < a.tokens ? token : a.tokens - 1;
  const int experts = a.experts;
  const int first = lane * N;
  const bool half = a.type == LogitType::kHalf;

  uint16_t raw[N];
  load_row(static_cast<const uint16_t*>(a.logits) + t * a.stride, first, experts, a.vector_rows,
           raw);
  uint32_t key[N];
  bool nan = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    key[i] = first + i < experts ? Packed::make(raw[i], first + i, half, nan) : 0u;
  }
  const bool poisoned = Reduce<kLanes>::any(nan);
  float highest = 0;
  float total = 0;
  if (!a.renormalize) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) most = max(most, key[i]);
    highest = Packed::value(Reduce<kLanes>::max(most), half);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (key[i] != 0) total += exponential(Packed::value(key[i], half) - highest);
    }
    total = Reduce<kLanes>::sum(poisoned ? bits_of<float>(0x7fc00000u) : total);
  }
  const uint32_t mine = choose<kLanes>(a, lane, key);
  const float x = Packed::value(lane < a.top_k ? mine : 0x80000000u, half);
  const float weight = weight_of<kLanes>(a, lane, x, poisoned, highest, total);
  if (lane < a.top_k && token < a.tokens) {
    static_cast<float*>(a.weights)[t * a.top_k + lane] = weight;
    a.ids[t * a.top_k + lane] = Packed::id(mine);
  }
}

// Any score, in 64-bit keys. Fewest bytes: T*E logits and E biases read, 8*T*K written.
template <int kLanes, int N>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(const RouteArgs a) {
  extern __shared__ float dynamic[];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x) / kLanes;
  const int64_t t = token < a.tokens ? token : a.tokens - 1;
  const int experts = a.experts;
  const int first = lane * N;
  const bool half = a.type == LogitType::kHalf;
  const auto* row32 = static_cast<const float*>(a.logits) + t * a.stride;
  const auto* row16 = static_cast<const uint16_t*>(a.logits) + t * a.stride;

  float x[N];
  if (a.type == LogitType::kFloat) {
    load_row(row32, first, experts, a.vector_rows, x);
  } else {
    uint16_t raw[N];
    load_row(row16, first, experts, a.vector_rows, raw);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen_bits(raw[i], half);
  }

  bool nan = false;
#pragma unroll
  for (int i = 0; i < N; ++i) nan = nan || (first + i < experts && x[i] != x[i]);
  bool poisoned = Reduce<kLanes>::any(nan);
  float highest = 0;
  float total = 0;
  // A renormalised softmax in the order of its logits needs the chosen ones alone.
  if (a.softmax && !(a.by_logit && a.renormalize)) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i < experts) most = max(most, order_of(x[i]));
    }
    highest = from_order(Reduce<kLanes>::max(most));
    poisoned = poisoned || fabsf(highest) == infinity<float>();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float e = exponential(x[i] - highest);
      if (!a.by_logit) x[i] = e;
      if (first + i < experts) total += e;
    }
    total = Reduce<kLanes>::sum(total);
  }
  if (!a.by_logit) {
    const float inverse = a.softmax ? reciprocal(total) : 0.f;
    float bias[N] = {};
    if (a.bias != nullptr) {
      load_row(static_cast<const float*>(a.bias), first, experts, a.vector_bias, bias);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = (a.softmax ? x[i] * inverse : logistic(x[i])) + bias[i];
      x[i] = x[i] == x[i] ? x[i] : -infinity<float>();
    }
    if (a.groups > 1) {
      const int pitch = a.experts + 2 * a.groups;
      float* shared = dynamic + static_cast<int>(threadIdx.x) / kLanes * pitch;
      limit_groups<kLanes>(a, lane, first, shared, x);
    }
  }

  uint64_t key[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    key[i] = first + i < experts ? Wide::make(order_of(x[i]), first + i) : 0u;
  }
  const uint64_t mine = choose<kLanes>(a, lane, key);
  const int id = lane < a.top_k ? Wide::id(mine) : 0;
  float chosen;
  if (a.by_logit) {
    chosen = lane < a.top_k ? Wide::value(mine) : 0.f;
  } else {
    chosen = a.type == LogitType::kFloat ? row32[id] : widen_bits(row16[id], half);
  }
  const float weight = weight_of<kLanes>(a, lane, chosen, poisoned, highest, total);
  if (lane < a.top_k && token < a.tokens) {
    static_cast<float*>(a.weights)[t * a.top_k + lane] = weight;
    a.ids[t * a.top_k + lane] = id;
  }
}

}  // namespace ppmoe
