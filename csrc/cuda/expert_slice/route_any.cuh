// route for any number of experts and choices, and for float64: a warp scans its token's scores
// once for every choice, taking the best one below the last. It keeps nothing but that one; routers
// of today have at most 512 experts and are served by route_row.cuh.
#pragma once

#include "route_keys.cuh"

namespace ppmoe {

inline constexpr int kRouteAnyThreads = 128;

// A score with its id: larger scores first, then lower ids.
template <class W>
struct Choice {
  W score;
  int id;

  __device__ bool before(const Choice& other) const {
    return score > other.score || (score == other.score && id < other.id);
  }
  __device__ Choice best_of_warp() const {
    Choice best = *this;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const Choice other{__shfl_xor_sync(kEveryLane, best.score, step),
                         __shfl_xor_sync(kEveryLane, best.id, step)};
      if (other.before(best)) best = other;
    }
    return best;
  }
};

template <class T>
struct AnyRow {
  using W = Accumulator<T>;
  const RouteArgs& a;
  const T* logits;
  int experts;
  W highest;
  W total;
  W inverse;

  __device__ AnyRow(const RouteArgs& args, int64_t token, int lane)
      : a(args),
        logits(static_cast<const T*>(a.logits) + token * a.stride),
        experts(a.experts),
        highest(0),
        total(0),
        inverse(0) {
    if (!a.softmax) return;
    highest = -infinity<W>();
#pragma unroll 1
    for (int e = lane; e < experts; e += 32) highest = larger(highest, widen(logits[e]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      highest = larger(highest, __shfl_xor_sync(kEveryLane, highest, step));
    }
#pragma unroll 1
    for (int e = lane; e < experts; e += 32) total += exponential(widen(logits[e]) - highest);
    total = warp_sum(total);
    inverse = reciprocal(total);
  }

  __device__ W score(int e) const {
    const W x = widen(logits[e]);
    return a.softmax ? exponential(x - highest) * inverse : logistic(x);
  }

  __device__ W key(int e) const {
    W x = a.by_logit ? static_cast<W>(widen(logits[e])) : score(e);
    if (a.bias != nullptr) x += static_cast<const W*>(a.bias)[e];
    return x == x ? x : -infinity<W>();
  }
};

// rank[g] is the sum of the two best keys of group g, chosen[g] whether its experts may be chosen.
template <class T, class W>
__device__ void choose_groups(const AnyRow<T>& row, int lane, W* rank, W* chosen) {
  const RouteArgs& a = row.a;
  for (int g = lane; g < a.groups; g += 32) {
    W best = -infinity<W>();
    W second = best;
#pragma unroll 1
    for (int e = g * a.group_size; e < (g + 1) * a.group_size; ++e) {
      const W x = row.key(e);
      second = larger(second, smaller(best, x));
      best = larger(best, x);
    }
    const W sum = a.group_size == 1 ? best : best + second;
    rank[g] = sum == sum ? sum : -infinity<W>();
  }
  __syncwarp();
  for (int g = lane; g < a.groups; g += 32) {
    int better = 0;
    for (int other = 0; other < a.groups; ++other) {
      better += rank[other] > rank[g] || (rank[other] == rank[g] && other < g);
    }
    chosen[g] = better < a.top_groups ? 1 : 0;
  }
  __syncwarp();
}

// Fewest bytes: T*E logits and E biases read, T*K weights and ids written.
template <class T>
__global__ void __launch_bounds__(kRouteAnyThreads, 4) route_any_kernel(const RouteArgs a) {
  using W = Accumulator<T>;
  constexpr int kWarps = kRouteAnyThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const auto scale = static_cast<W>(a.scale);
  W* rank = static_cast<W*>(a.scratch) + warp * 2 * a.groups;
  W* chosen = rank + a.groups;
  for (int64_t t = warp; t < a.tokens; t += static_cast<int64_t>(gridDim.x) * kWarps) {
    const AnyRow<T> row(a, t, lane);
    W* weights = static_cast<W*>(a.weights) + t * a.top_k;
    int* ids = a.ids + t * a.top_k;
    if (a.groups > 1) choose_groups(row, lane, rank, chosen);

    Choice<W> last{infinity<W>(), -1};
    W highest = -infinity<W>();
    for (int k = 0; k < a.top_k; ++k) {
      Choice<W> best{-infinity<W>(), a.experts};
#pragma unroll 1
      for (int e = lane; e < a.experts; e += 32) {
        Choice<W> here{row.key(e), e};
        if (a.groups > 1 && chosen[e / a.group_size] == 0) here.score = -infinity<W>();
        if (last.before(here) && here.before(best)) best = here;
      }
      last = best.best_of_warp();
      // A lane reads back only what it wrote itself.
      if (k % 32 == lane) ids[k] = last.id;
      highest = larger(highest, static_cast<W>(widen(row.logits[last.id])));
    }

    const bool selected_only = a.softmax && a.renormalize;
    W total = 0;
    for (int k = lane; k < a.top_k; k += 32) {
      const W x = widen(row.logits[ids[k]]);
      weights[k] = selected_only ? exponential(x - highest) : row.score(ids[k]);
      total += weights[k];
    }
    total = warp_sum(total) + (a.softmax ? W(0) : static_cast<W>(kSigmoidSumFloor));
    if (selected_only) total += row.total - row.total;  // NaN where the whole row's sum is
    const W factor = a.renormalize ? 1 / total : W(1);
    for (int k = lane; k < a.top_k; k += 32) {
      weights[k] = weights[k] * factor * scale;
    }
    __syncwarp();
  }
}

}  // namespace ppmoe
