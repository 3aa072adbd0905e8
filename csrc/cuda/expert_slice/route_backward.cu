// The gradient of route's weights to the logits on CUDA, in one launch: a warp writes a token's row
// and then, where the gradient is not the same for all experts, the chosen ones once more.

#include <torch/csrc/stable/library.h>

#include <climits>
#include <optional>
#include <vector>

#include "route_keys.cuh"
#include "routing.cuh"

namespace ppmoe {
namespace {

constexpr const char* kOp = "route_backward";
constexpr int kThreads = 128;

template <class T>
struct RouteBackward {
  const Accumulator<T>* grad;     // [T, K]
  const Accumulator<T>* weights;  // [T, K]
  const int* ids;                 // [T, K]
  const T* logits;                // [T, E], or null where weights alone are needed
  int64_t stride;
  T* out;  // [T, E]
  int64_t tokens;
  int experts;
  int top_k;
  bool softmax;
  bool renormalize;
  double scale;
};

// exp(x - highest) / total over the row, in vectors of kStep elements a lane.
template <class T, int kStep>
struct Softmax {
  using W = Accumulator<T>;
  using V = Vec<T, kStep>;
  W highest;
  W inverse;  // of the sum

  __device__ Softmax(const T* row, int experts, int lane) : highest(-infinity<W>()) {
    W total = 0;
    for (int e = lane * kStep; e < experts; e += 32 * kStep) {
      const V x = load<V>(row + e);
#pragma unroll
      for (int i = 0; i < kStep; ++i) highest = larger(highest, widen(x.lane[i]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      highest = larger(highest, __shfl_xor_sync(kEveryLane, highest, step));
    }
    for (int e = lane * kStep; e < experts; e += 32 * kStep) {
      const V x = load<V>(row + e);
#pragma unroll
      for (int i = 0; i < kStep; ++i) total += exponential(widen(x.lane[i]) - highest);
    }
    inverse = reciprocal(warp_sum(total));
  }
  __device__ W share(T x) const { return exponential(widen(x) - highest) * inverse; }
};

__device__ __forceinline__ bool is_expert(int id, int experts) {
  return static_cast<unsigned>(id) < static_cast<unsigned>(experts);
}

// Fewest bytes: 12*T*K read, T*E written, and the logits read where the unselected have a gradient.
// An id that is no expert is passed over.
template <class T, int kStep>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(const RouteBackward<T> a) {
  using W = Accumulator<T>;
  using V = Vec<T, kStep>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (t >= a.tokens) return;
  const W* grad = a.grad + t * a.top_k;
  const W* weights = a.weights + t * a.top_k;
  const int* ids = a.ids + t * a.top_k;
  const T* row = a.logits + t * a.stride;
  T* out = a.out + t * a.experts;
  const auto scale = static_cast<W>(a.scale);

  if (a.softmax && !a.renormalize) {
    // In double: where one share is near 1, a gradient and the mean nearly cancel.
    const Softmax<T, kStep> softmax(row, a.experts, lane);
    double mean = 0;
    for (int k = lane; k < a.top_k; k += 32) {
      if (is_expert(ids[k], a.experts)) {
        mean += static_cast<double>(grad[k]) * softmax.share(row[ids[k]]);
      }
    }
    mean = warp_sum(mean);
    const auto rest = static_cast<W>(-mean * a.scale);
    for (int e = lane * kStep; e < a.experts; e += 32 * kStep) {
      V x = load<V>(row + e);
#pragma unroll
      for (int i = 0; i < kStep; ++i) x.lane[i] = narrow<T>(softmax.share(x.lane[i]) * rest);
      store(out + e, x);
    }
    __syncwarp();
    for (int k = lane; k < a.top_k; k += 32) {
      if (!is_expert(ids[k], a.experts)) continue;
      const auto difference = static_cast<W>((grad[k] - mean) * a.scale);
      out[ids[k]] = narrow<T>(softmax.share(row[ids[k]]) * difference);
    }
    return;
  }

  V zero;
#pragma unroll
  for (int i = 0; i < kStep; ++i) zero.lane[i] = narrow<T>(W(0));
  for (int e = lane * kStep; e < a.experts; e += 32 * kStep) store(out + e, zero);
  W total = 0;
  W mean = 0;
  for (int k = lane; k < a.top_k; k += 32) {
    if (a.softmax) {
      mean += grad[k] * weights[k];
    } else if (a.renormalize && is_expert(ids[k], a.experts)) {
      const W score = logistic(static_cast<W>(widen(row[ids[k]])));
      total += score;
      mean += grad[k] * score;
    }
  }
  mean = warp_sum(mean);
  if (a.softmax) {
    mean *= a.scale != 0 ? static_cast<W>(1 / a.scale) : W(0);
  } else if (a.renormalize) {
    total = warp_sum(total) + static_cast<W>(kSigmoidSumFloor);
    mean /= total;
  } else {
    total = 1;
  }
  __syncwarp();  // the row's zeros come before the chosen ones
  for (int k = lane; k < a.top_k; k += 32) {
    if (!is_expert(ids[k], a.experts)) continue;
    W result;
    if (a.softmax) {
      result = weights[k] * (grad[k] - mean);
    } else {
      const W x = widen(row[ids[k]]);
      result = (grad[k] - mean) / total * scale * logistic(x) * logistic(-x);
    }
    out[ids[k]] = narrow<T>(result);
  }
}

// PPMOE_OPS_CHECK=1: as the reference, which raises for an id that is no expert.
void check_ids(const Tensor& experts, int64_t num_experts, cudaStream_t stream) {
  if (!checks_indices()) return;
  std::vector<int32_t> host(static_cast<size_t>(experts.numel()));
  check_cuda(kOp, "reading experts",
             cudaMemcpyAsync(host.data(), experts.const_data_ptr(), host.size() * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, stream));
  check_cuda(kOp, "reading experts", cudaStreamSynchronize(stream));
  for (const int32_t id : host) {
    if (id < 0 || id >= num_experts) {
      bad_index(kOp, ": experts holds ", id, "; allowed: 0 to ", num_experts - 1);
    }
  }
}

void check_like(const char* argument, const Tensor& tensor, const Tensor& weights) {
  check_size(kOp, argument, "T", tensor.size(0), weights.size(0), "as weights");
  check_size(kOp, argument, "K", tensor.size(1), weights.size(1), "as weights");
  check_device(kOp, argument, tensor, weights);
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& weights, const Tensor& experts,
                      std::optional<Tensor> logits, int64_t num_experts, ScalarType dtype,
                      StringHandle score_handle, bool renormalize, double scale) {
  const String score(score_handle);
  const bool softmax = is_softmax(kOp, score.text());
  check_dim(kOp, "weights", weights, "T, K");
  check_dtype(kOp, "weights", weights, {ScalarType::Float, ScalarType::Double});
  check_dim(kOp, "experts", experts, "T, K");
  check_dtype(kOp, "experts", experts, {ScalarType::Int});
  check_dim(kOp, "grad_weights", grad_weights, "T, K");
  check_dtype(kOp, "grad_weights", grad_weights, {weights.scalar_type()}, "as weights");
  check_like("grad_weights", grad_weights, weights);
  check_like("experts", experts, weights);
  check_between(kOp, "num_experts", num_experts, 1, INT_MAX);
  if (weights.scalar_type() == ScalarType::Double) {
    check_dtype(kOp, "the result", dtype, {ScalarType::Double}, "for these weights");
  } else {
    check_dtype(kOp, "the result", dtype,
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, "for these weights");
  }
  const bool needs_logits = !softmax || !renormalize;
  if (needs_logits) {
    if (!logits.has_value()) {
      bad_value(kOp, ": logits is None; expected a tensor (for this score)");
    }
    check_dim(kOp, "logits", *logits, "T, E");
    check_dtype(kOp, "logits", *logits, {dtype}, "as dtype");
    check_size(kOp, "logits", "T", logits->size(0), weights.size(0), "as weights");
    check_size(kOp, "logits", "E", logits->size(1), num_experts, "num_experts");
    check_device(kOp, "logits", *logits, weights);
  }

  const int64_t tokens = weights.size(0);
  const Tensor out = empty_like_device<2>(weights, {tokens, num_experts}, dtype);
  if (tokens == 0) return out;
  const LaunchScope scope(kOp, weights);
  const Tensor grads = as_contiguous(grad_weights);
  const Tensor dense_weights = as_contiguous(weights);
  const Tensor ids = as_contiguous(experts);
  // Without logits, `out` stands in where their alignment is asked for.
  const Tensor rows = needs_logits ? with_dense_rows(*logits) : out;
  check_ids(ids, num_experts, scope.stream());
  by_dtype(dtype, [&]<class T>() {
    using W = Accumulator<T>;
    const RouteBackward<T> args{static_cast<const W*>(grads.const_data_ptr()),
                                static_cast<const W*>(dense_weights.const_data_ptr()),
                                static_cast<const int*>(ids.const_data_ptr()),
                                static_cast<const T*>(rows.const_data_ptr()),
                                rows.stride(0),
                                static_cast<T*>(out.mutable_data_ptr()),
                                tokens,
                                static_cast<int>(num_experts),
                                static_cast<int>(weights.size(1)),
                                softmax,
                                renormalize,
                                scale};
    constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
    const auto blocks = static_cast<unsigned>((tokens + kThreads / 32 - 1) / (kThreads / 32));
    if (aligned(rows, kVectorBytes) && aligned(out, kVectorBytes)) {
      route_backward_kernel<T, kWide><<<blocks, kThreads, 0, scope.stream()>>>(args);
    } else {
      route_backward_kernel<T, 1><<<blocks, kThreads, 0, scope.stream()>>>(args);
    }
    check_launch(kOp, "route_backward_kernel");
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) {
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace
}  // namespace ppmoe
