// route: scores, selection and weights of a router, a row at a time.
//
// Selection packs (order of the score, lower id first) into one signed 64-bit key, so that keys are
// distinct and top-k is exact. For K <= 16 the keys pass through vertical sorting networks, eight
// lists side by side, and the lists are then merged pairwise; nothing branches on the data.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr double kSigmoidSumFloor = 1e-20;
constexpr int64_t kLowest = INT64_MIN;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

PPMOE_INLINE VecL larger(VecL a, VecL b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecL>(
      _mm512_max_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return a > b ? a : b;
#endif
}

PPMOE_INLINE VecL smaller(VecL a, VecL b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecL>(
      _mm512_min_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return a > b ? b : a;
#endif
}

PPMOE_INLINE void descend(VecL& a, VecL& b) {
  const VecL high = larger(a, b);
  b = smaller(a, b);
  a = high;
}

// Puts a bitonic sequence of D vectors into descending order, lane by lane.
template <int D>
PPMOE_INLINE void order_bitonic(VecL* v) {
#pragma GCC unroll 4
  for (int step = D / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) {
      if ((i & step) == 0) descend(v[i], v[i + step]);
    }
  }
}

// Sorts D vectors, lane by lane, in descending order (Batcher's bitonic network).
template <int D>
PPMOE_INLINE void sort_lists(VecL* v) {
  if constexpr (D > 1) {
    sort_lists<D / 2>(v);
    sort_lists<D / 2>(v + D / 2);
#pragma GCC unroll 8
    for (int i = 0; i < D / 2; ++i) descend(v[i], v[D - 1 - i]);
    order_bitonic<D / 2>(v);
    order_bitonic<D / 2>(v + D / 2);
  }
}

// v := the D largest of the two descending lists v and w, descending.
template <int D>
PPMOE_INLINE void merge_lists(VecL* v, const VecL* w) {
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i) v[i] = larger(v[i], w[D - 1 - i]);
  order_bitonic<D>(v);
}

// An int32 with the order of x: NaN as -inf, -0 as +0.
PPMOE_INLINE VecI ordered(VecF x) {
  const VecF clean = (x == x ? x : splat(-kInfinity)) + 0.f;
  const VecI bits = reinterpret_cast<VecI>(clean);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

PPMOE_INLINE float from_ordered(int32_t order) {
  const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// A vector of scores to two of keys: the order above, the complement of the id below.
PPMOE_INLINE void pack_keys(VecF x, int32_t first, VecL& low, VecL& high) {
  const VecI id = 0x7fffffff - first - lane_numbers();
  const VecI order = ordered(x);
  low = reinterpret_cast<VecL>(unpack_low(id, order));
  high = reinterpret_cast<VecL>(unpack_high(id, order));
}

PPMOE_INLINE int32_t key_id(int64_t key) {
  return 0x7fffffff - static_cast<int32_t>(static_cast<uint32_t>(key));
}

PPMOE_INLINE float key_value(int64_t key) { return from_ordered(static_cast<int32_t>(key >> 32)); }

// The D best keys of score[0, padded), best first. `padded` is a multiple of 16; scores past the
// experts are -inf and lose every tie by their ids.
template <int D>
PPMOE_INLINE void select_lists(const float* score, int64_t padded, int64_t* best) {
  constexpr int half = kLanes / 2;         // keys in a vector
  constexpr int vectors = D == 1 ? 2 : D;  // that are sorted together
  constexpr int64_t chunk = half * vectors;
  VecL lists[D];
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i) lists[i] = VecL{} + kLowest;
  for (int64_t at = 0; at < padded; at += chunk) {
    VecL fresh[vectors];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i += 2) {
      const int64_t first = at + i * half;
      if (first < padded) {
        pack_keys(load<VecF>(score + first), static_cast<int32_t>(first), fresh[i], fresh[i + 1]);
      } else {
        fresh[i] = fresh[i + 1] = VecL{} + kLowest;
      }
    }
    if constexpr (D == 1) {
      lists[0] = larger(lists[0], larger(fresh[0], fresh[1]));
    } else {
      sort_lists<D>(fresh);
      merge_lists<D>(lists, fresh);
    }
  }
#pragma GCC unroll 3
  for (int distance = half / 2; distance > 0; distance /= 2) {
    VecL other[D];
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) other[i] = swap_lanes(lists[i], distance);
    merge_lists<D>(lists, other);
  }
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i) best[i] = lists[i][0];
}

// Any K: insertion into a sorted list, skipping a vector of scores at once that cannot enter it.
void select_any(const float* score, int64_t padded, int64_t top_k, int64_t* best) {
  for (int64_t k = 0; k < top_k; ++k) best[k] = kLowest;
  for (int64_t at = 0; at < padded; at += kLanes) {
    int64_t keys[kLanes];
    VecL low, high;
    pack_keys(load<VecF>(score + at), static_cast<int32_t>(at), low, high);
    const VecL worst = VecL{} + best[top_k - 1];
    if (!any(reinterpret_cast<VecI>((low > worst) | (high > worst)))) continue;
    store(keys, low);
    store(keys + kLanes / 2, high);
    for (int i = 0; i < kLanes; ++i) {
      if (keys[i] <= best[top_k - 1]) continue;
      int64_t k = top_k - 1;
      for (; k > 0 && best[k - 1] < keys[i]; --k) best[k] = best[k - 1];
      best[k] = keys[i];
    }
  }
}

PPMOE_INLINE void select(const float* score, int64_t padded, int64_t top_k, int64_t* best) {
  if (top_k == 1) return select_lists<1>(score, padded, best);
  if (top_k == 2) return select_lists<2>(score, padded, best);
  if (top_k <= 4) return select_lists<4>(score, padded, best);
  if (top_k <= 8) return select_lists<8>(score, padded, best);
  if (top_k <= 16) return select_lists<16>(score, padded, best);
  select_any(score, padded, top_k, best);
}

PPMOE_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp(x < 0.f ? x : -x);
  return (x < 0.f ? e : splat(1.f)) / (1.f + e);
}

// Softmax of row[0, padded) into score; the row's padding is -inf.
PPMOE_INLINE void softmax_row(const float* row, int64_t padded, float* score) {
  VecF high = splat(-kInfinity);
  for (int64_t i = 0; i < padded; i += kLanes) high = max(load<VecF>(row + i), high);
  const float top = largest(high);
  // Sixteen sums side by side on every instruction set: the fewer, the longer and the less exact.
  constexpr int kSums = 16 / kLanes;
  VecF totals[kSums] = {};
  for (int64_t i = 0; i < padded; i += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      const VecF e = exp(load<VecF>(row + i + j * kLanes) - top);
      store(score + i + j * kLanes, e);
      totals[j] += e;
    }
  }
  VecF total = totals[0];
  for (int j = 1; j < kSums; ++j) total += totals[j];
  const float all = sum(total);
  for (int64_t i = 0; i < padded; i += kLanes) store(score + i, load<VecF>(score + i) / all);
}

// The sum of the two largest of key[0, size); the largest where there is but one.
PPMOE_INLINE float best_two(const float* key, int64_t size) {
  float first = -kInfinity, second = -kInfinity;
  int64_t i = 0;
  if (size >= kLanes) {
    VecF high = splat(-kInfinity), next = high;
    for (; i + kLanes <= size; i += kLanes) {
      const VecF x = load<VecF>(key + i);
      next = max(next, x < high ? x : high);
      high = max(high, x);
    }
#pragma GCC unroll 4
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const VecF other = swap_lanes(high, distance);
      next = max(max(next, swap_lanes(next, distance)), other < high ? other : high);
      high = max(high, other);
    }
    first = high[0];
    second = next[0];
  }
  for (; i < size; ++i) {
    if (key[i] > first) {
      second = first;
      first = key[i];
    } else if (key[i] > second) {
      second = key[i];
    }
  }
  const float total = size == 1 ? first : first + second;
  return total == total ? total : -kInfinity;
}

// -inf for every expert outside the groups with the largest sums of their two best keys.
void limit_groups(float* key, int64_t experts, int64_t groups, int64_t top_groups, float* rank) {
  const int64_t size = experts / groups;
  for (int64_t g = 0; g < groups; ++g) rank[g] = best_two(key + g * size, size);
  for (int64_t g = 0; g < groups; ++g) {
    int64_t better = 0;
    for (int64_t other = 0; other < groups; ++other) {
      better += rank[other] > rank[g] || (rank[other] == rank[g] && other < g);
    }
    if (better < top_groups) continue;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) key[i] = -kInfinity;
  }
}

// Whether softmax over the row is NaN: some logit is NaN or +inf, or all are -inf.
PPMOE_INLINE bool poisoned(const float* row, int64_t padded) {
  VecF high = splat(-kInfinity);
  VecI nan{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VecF x = load<VecF>(row + i);
    nan |= reinterpret_cast<VecI>(x != x);
    high = max(x, high);
  }
  const float top = largest(high);
  return any(nan) || top == kInfinity || top == -kInfinity;
}

// Weights of a renormalised softmax need only the selected logits.
PPMOE_INLINE void softmax_selected(const float* row, const int32_t* ids, int64_t top_k, float scale,
                                   float* weights) {
  float highest = row[ids[0]];  // with a bias the best key need not be the largest logit
  for (int64_t k = 1; k < top_k; ++k) highest = row[ids[k]] > highest ? row[ids[k]] : highest;
  double total = 0;
  for (int64_t k = 0; k < top_k; k += kLanes) {
    const int64_t here = top_k - k < kLanes ? top_k - k : kLanes;
    VecF x = splat(-kInfinity);
    for (int64_t i = 0; i < here; ++i) x[i] = row[ids[k + i]] - highest;
    x = exp(x);
    for (int64_t i = 0; i < here; ++i) weights[k + i] = x[i];
    total += sum(x);
  }
  const float factor = static_cast<float>(scale / total);
  for (int64_t k = 0; k < top_k; ++k) weights[k] *= factor;
}

template <class T>
PPMOE_INLINE void load_row(const T* from, int64_t experts, int64_t padded, float* row) {
  int64_t i = 0;
  for (; i + kLanes <= experts; i += kLanes) store(row + i, load_wide(from + i));
  for (; i < experts; ++i) row[i] = to_float(from[i]);
  for (; i < padded; ++i) row[i] = -kInfinity;
}

template <class T>
void route_rows(const Route& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = round_up(a.experts, 16);
  float* copy = scratch;
  float* score = copy + padded;
  float* key = score + padded;
  float* rank = key + padded;
  int64_t* best = reinterpret_cast<int64_t*>(rank + round_up(a.groups, 16));
  const float* bias = static_cast<const float*>(a.bias);
  const float scale = static_cast<float>(a.scale);
  const bool by_logit = a.softmax && bias == nullptr && a.groups == 1;
  const bool selected_only = a.softmax && a.renormalize;
  const bool direct = sizeof(T) == 4 && a.experts == padded;

  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(a.logits) + t * a.stride;
    float* weights = static_cast<float*>(a.weights) + t * a.top_k;
    int32_t* ids = a.ids + t * a.top_k;
    if (!direct) load_row(logits, a.experts, padded, copy);
    const float* row = direct ? reinterpret_cast<const float*>(logits) : copy;

    if (!(by_logit && selected_only)) {
      if (a.softmax) {
        softmax_row(row, padded, score);
      } else {
        for (int64_t i = 0; i < padded; i += kLanes) store(score + i, sigmoid(load<VecF>(row + i)));
      }
    }
    const float* order = row;
    if (!by_logit) {
      order = key;
      for (int64_t i = 0; i < a.experts; ++i) {
        const float x = bias != nullptr ? score[i] + bias[i] : score[i];
        key[i] = x == x ? x : -kInfinity;
      }
      for (int64_t i = a.experts; i < padded; ++i) key[i] = -kInfinity;
      if (a.groups > 1) limit_groups(key, a.experts, a.groups, a.top_groups, rank);
    }
    select(order, padded, a.top_k, best);
    for (int64_t k = 0; k < a.top_k; ++k) ids[k] = key_id(best[k]);

    if (selected_only) {
      if (poisoned(row, padded)) {
        for (int64_t k = 0; k < a.top_k; ++k) weights[k] = __builtin_nanf("");
      } else {
        softmax_selected(row, ids, a.top_k, scale, weights);
      }
      continue;
    }
    double total = kSigmoidSumFloor;
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k] = score[ids[k]];
    const float factor = a.renormalize ? static_cast<float>(scale / total) : scale;
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] *= factor;
  }
}

}  // namespace

int64_t route_scratch(const Route& a) {
  const int64_t padded = round_up(a.experts, 16);
  if (a.dtype == DType::kF64) return 8 * (2 * a.experts + a.groups);
  return 4 * (3 * padded + round_up(a.groups, 16)) + 8 * round_up(a.top_k, 16);
}

void route(const Route& a, int64_t begin, int64_t end, void* scratch) {
  float* floats = static_cast<float*>(scratch);
  switch (a.dtype) {
    case DType::kF32: return route_rows<float>(a, begin, end, floats);
    case DType::kBf16: return route_rows<Bf16>(a, begin, end, floats);
    case DType::kF16: return route_rows<F16>(a, begin, end, floats);
    case DType::kF64: return route_f64(a, begin, end, static_cast<double*>(scratch));
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
