// route in float64: the same steps as route.cpp in plain scalar code, for gradcheck.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr double kSigmoidSumFloor = 1e-20;

bool goes_before(double a, int64_t a_id, double b, int64_t b_id) {
  return a > b || (a == b && a_id < b_id);
}

void select(const double* key, int64_t experts, int64_t top_k, int32_t* ids) {
  int64_t found = 0;
  for (int64_t i = 0; i < experts; ++i) {
    if (found == top_k && !goes_before(key[i], i, key[ids[found - 1]], ids[found - 1])) continue;
    int64_t k = found < top_k ? found++ : top_k - 1;
    for (; k > 0 && goes_before(key[i], i, key[ids[k - 1]], ids[k - 1]); --k) ids[k] = ids[k - 1];
    ids[k] = static_cast<int32_t>(i);
  }
}

void limit_groups(double* key, int64_t experts, int64_t groups, int64_t top_groups, double* rank) {
  const int64_t size = experts / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double first = -kInfinity, second = -kInfinity;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      if (key[i] > first) {
        second = first;
        first = key[i];
      } else if (key[i] > second) {
        second = key[i];
      }
    }
    const double total = size == 1 ? first : first + second;
    rank[g] = total == total ? total : -kInfinity;
  }
  for (int64_t g = 0; g < groups; ++g) {
    int64_t better = 0;
    for (int64_t other = 0; other < groups; ++other) {
      better += goes_before(rank[other], other, rank[g], g);
    }
    if (better < top_groups) continue;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) key[i] = -kInfinity;
  }
}

// Softmax of n values into out; NaN throughout where some value is NaN or +inf, or all are -inf.
void softmax(const double* x, int64_t n, double* out) {
  double top = -kInfinity;
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += out[i] = __builtin_exp(x[i] - top);
  for (int64_t i = 0; i < n; ++i) out[i] /= total;
}

}  // namespace

void route_f64(const Route& a, int64_t begin, int64_t end, double* scratch) {
  double* score = scratch;
  double* key = score + a.experts;
  double* rank = key + a.experts;
  const double* bias = static_cast<const double*>(a.bias);
  const bool by_logit = a.softmax && bias == nullptr && a.groups == 1;
  for (int64_t t = begin; t < end; ++t) {
    const double* row = static_cast<const double*>(a.logits) + t * a.stride;
    double* weights = static_cast<double*>(a.weights) + t * a.top_k;
    int32_t* ids = a.ids + t * a.top_k;
    if (a.softmax) {
      softmax(row, a.experts, score);
    } else {
      for (int64_t i = 0; i < a.experts; ++i) score[i] = 1 / (1 + __builtin_exp(-row[i]));
    }
    for (int64_t i = 0; i < a.experts; ++i) {
      const double x = by_logit ? row[i] : score[i] + (bias != nullptr ? bias[i] : 0);
      key[i] = x == x ? x : -kInfinity;
    }
    if (a.groups > 1) limit_groups(key, a.experts, a.groups, a.top_groups, rank);
    select(key, a.experts, a.top_k, ids);

    if (a.softmax && a.renormalize) {
      const bool poisoned = score[0] != score[0];
      for (int64_t k = 0; k < a.top_k; ++k) key[k] = row[ids[k]];
      softmax(key, a.top_k, weights);
      for (int64_t k = 0; k < a.top_k; ++k) {
        weights[k] = poisoned ? __builtin_nan("") : weights[k] * a.scale;
      }
      continue;
    }
    double total = 0;
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k] = score[ids[k]];
    const double factor = a.renormalize ? a.scale / (total + kSigmoidSumFloor) : a.scale;
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] *= factor;
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
