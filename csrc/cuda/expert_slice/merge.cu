// merge_rows, its backward and the backward of slice_rows on CUDA: gathers, nothing is added
// atomically. Each first builds the inverse of `slots` (which row holds flat slot t*K+k), so that
// every output row has one owner and one order of additions.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.cuh"

namespace ppmoe {
namespace {

constexpr int kAhead = 4;          // gathered rows in flight per thread
constexpr int kPairs = 2;          // the same for pairs of a row and its gradient
constexpr int kSmallSlots = 8192;  // up to here one block inverts the slots in one launch
constexpr int kSmallThreads = 1024;

// inverse[slot] = row, over an inverse full of -1. A slot that comes twice belongs to its last row,
// as in a sequential loop.
__global__ void __launch_bounds__(kRowThreads)
    invert_slots_kernel(const int* __restrict__ slots, int count, int* __restrict__ inverse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= count) return;
  const int slot = slots[row];
  if (valid(slot, count)) atomicMax(&inverse[slot], static_cast<int>(row));
}

// The same in one block, which fills the inverse first and so saves a launch.
__global__ void __launch_bounds__(kSmallThreads)
    invert_few_slots_kernel(const int* __restrict__ slots, int count, int* __restrict__ inverse) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSmallThreads) inverse[i] = -1;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSmallThreads) {
    const int slot = slots[i];
    if (valid(slot, count)) atomicMax(&inverse[slot], i);
  }
}

// Fewest bytes: the local rows read, T rows written, T*K int32 and T*K weights read. Also the
// backward of slice_rows, where the weights are all one.
template <class T, int kLanes, bool kWeighted>
__global__ void __launch_bounds__(kRowThreads)
    merge_rows_kernel(const T* __restrict__ rows, int64_t rows_stride,
                      const int* __restrict__ inverse, const Accumulator<T>* __restrict__ weights,
                      T* __restrict__ out, int64_t tokens, int top_k, int64_t hidden) {
  using V = Vec<T, kLanes>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int* row_of = inverse + token * top_k;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kLanes;
  for (int64_t h = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kLanes;
       h < hidden; h += step) {
    Accumulator<T> sum[kLanes] = {};
    for (int first = 0; first < top_k; first += kAhead) {
      V value[kAhead];
      int row[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        row[j] = first + j < top_k ? row_of[first + j] : -1;
        if (row[j] >= 0) value[j] = load<V>(rows + row[j] * rows_stride + h);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (row[j] < 0) continue;
        if constexpr (kWeighted) {
          const Accumulator<T> weight = weights[token * top_k + first + j];
#pragma unroll
          for (int l = 0; l < kLanes; ++l) sum[l] += weight * widen(value[j].lane[l]);
        } else {
#pragma unroll
          for (int l = 0; l < kLanes; ++l) sum[l] += widen(value[j].lane[l]);
        }
      }
    }
    V result;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) result.lane[l] = narrow<T>(sum[l]);
    store(out + token * hidden + h, result);
  }
}

template <class T>
struct MergeBackward {
  const T* grad;  // [T, H]
  int64_t grad_stride;
  const T* rows;  // [T*K, H]
  int64_t rows_stride;
  const int* slots;
  const int* inverse;
  const Accumulator<T>* weights;
  T* grad_rows;
  Accumulator<T>* grad_weights;
  int count;
  int top_k;
  int64_t hidden;
};

// A warp per flat slot t*K+k: the K warps of a token stand side by side and share grad[t] through
// the cache. The warp also fills grad_rows[t*K+k] if no flat slot owns that row (the tail).
// Fewest bytes: T grad rows and the local rows read, T*K rows written, T*K weights read and
// written.
template <class T, int kLanes>
__global__ void __launch_bounds__(kRowThreads)
    merge_rows_backward_kernel(const MergeBackward<T> a) {
  using V = Vec<T, kLanes>;
  const int64_t slot = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kStep = 32 * kLanes;
  if (slot >= a.count) return;

  Accumulator<T> dot = 0;
  const int64_t row = a.inverse[slot];
  if (row >= 0) {
    const Accumulator<T> weight = a.weights[slot];
    const T* grad = a.grad + static_cast<int>(slot) / a.top_k * a.grad_stride;
    const T* value = a.rows + row * a.rows_stride;
    T* out = a.grad_rows + row * a.hidden;
    // Loads first: the compiler cannot move them over the stores of the round before.
    for (int64_t first = static_cast<int64_t>(lane) * kLanes; first < a.hidden;
         first += kPairs * kStep) {
      V g[kPairs];
      V v[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int64_t h = first + j * kStep;
        if (h < a.hidden) {
          g[j] = load<V>(grad + h);
          v[j] = load<V>(value + h);
        }
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int64_t h = first + j * kStep;
        if (h >= a.hidden) continue;
        V result;
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          dot += widen(g[j].lane[l]) * widen(v[j].lane[l]);
          result.lane[l] = narrow<T>(weight * widen(g[j].lane[l]));
        }
        store(out + h, result);
      }
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) a.grad_weights[slot] = dot;

  const int own = a.slots[slot];
  const bool local = valid(own, a.count);
  if (local && a.inverse[own] == slot) return;
  const Accumulator<T> weight = local ? a.weights[own] : 0;
  const T* grad = a.grad + (local ? own / a.top_k : 0) * a.grad_stride;
  T* out = a.grad_rows + slot * a.hidden;
  for (int64_t h = static_cast<int64_t>(lane) * kLanes; h < a.hidden; h += kStep) {
    V result{};
    if (local) {
      const V g = load<V>(grad + h);
#pragma unroll
      for (int l = 0; l < kLanes; ++l) result.lane[l] = narrow<T>(weight * widen(g.lane[l]));
    }
    store(out + h, result);
  }
}

Tensor inverse_of(const char* op, const Tensor& slots, cudaStream_t stream) {
  const int64_t count = slots.numel();
  const Tensor inverse = empty_like_device<1>(slots, {count}, ScalarType::Int);
  const auto* from = static_cast<const int*>(slots.const_data_ptr());
  auto* to = static_cast<int*>(inverse.mutable_data_ptr());
  if (count <= kSmallSlots) {
    invert_few_slots_kernel<<<1, kSmallThreads, 0, stream>>>(from, static_cast<int>(count), to);
  } else {
    check_cuda(op, "filling the inverse",
               cudaMemsetAsync(to, 0xff, static_cast<size_t>(count) * sizeof(int), stream));
    const auto blocks = static_cast<unsigned>((count + kRowThreads - 1) / kRowThreads);
    invert_slots_kernel<<<blocks, kRowThreads, 0, stream>>>(from, static_cast<int>(count), to);
  }
  check_launch(op, "invert_slots_kernel");
  return inverse;
}

template <class T>
void launch_merge(const char* op, const Tensor& rows, const Tensor& inverse, const Tensor* weights,
                  const Tensor& out, int top_k, cudaStream_t stream) {
  const auto* from = static_cast<const T*>(rows.const_data_ptr());
  const auto* row_of = static_cast<const int*>(inverse.const_data_ptr());
  const auto* scale =
      weights == nullptr ? nullptr : static_cast<const Accumulator<T>*>(weights->const_data_ptr());
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t tokens = out.size(0);
  const int64_t hidden = out.size(1);
  const auto run = [&]<int kLanes, bool kWeighted>() {
    const RowShape shape(tokens, (hidden + kLanes - 1) / kLanes, 1);
    merge_rows_kernel<T, kLanes, kWeighted><<<shape.grid, shape.block, 0, stream>>>(
        from, rows.stride(0), row_of, scale, to, tokens, top_k, hidden);
  };
  constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
  if (aligned(rows, kVectorBytes) && aligned(out, kVectorBytes)) {
    weights == nullptr ? run.template operator()<kWide, false>()
                       : run.template operator()<kWide, true>();
  } else {
    weights == nullptr ? run.template operator()<1, false>() : run.template operator()<1, true>();
  }
  check_launch(op, "merge_rows_kernel");
}

Tensor slice_rows_backward(const Tensor& grad, const Tensor& slots, int64_t top_k) {
  constexpr const char* kOp = "slice_rows_backward";
  check_dim(kOp, "grad", grad, "T*K, H");
  check_dtype(kOp, "grad", grad, kFloats);
  check_between(kOp, "top_k", top_k, 1, INT_MAX);
  check_slots_argument(kOp, slots, grad, grad.size(0), "as grad");
  if (slots.size(0) % top_k != 0) {
    bad_value(kOp, ": slots has T*K = ", slots.size(0), "; expected a multiple of top_k = ", top_k);
  }

  const Tensor out =
      empty_like_device<2>(grad, {grad.size(0) / top_k, grad.size(1)}, grad.scalar_type());
  if (out.numel() == 0) return out;
  const LaunchScope scope(kOp, grad);
  const Tensor rows = with_dense_rows(grad);
  const Tensor dense_slots = as_contiguous(slots);
  check_slots(kOp, dense_slots, true, scope.stream());
  const Tensor inverse = inverse_of(kOp, dense_slots, scope.stream());
  by_dtype(rows.scalar_type(), [&]<class T>() {
    launch_merge<T>(kOp, rows, inverse, nullptr, out, static_cast<int>(top_k), scope.stream());
  });
  return out;
}

void check_merge(const char* op, const Tensor& rows, const Tensor& slots, const Tensor& weights) {
  check_dim(op, "rows", rows, "T*K, H");
  check_dtype(op, "rows", rows, kFloats);
  check_dim(op, "weights", weights, "T, K");
  const bool wide = rows.scalar_type() == ScalarType::Double;
  check_dtype(op, "weights", weights, {wide ? ScalarType::Double : ScalarType::Float},
              "for these rows");
  check_slots_argument(op, slots, rows, rows.size(0), "as rows");
  check_size(op, "rows", "T*K", rows.size(0), weights.size(0) * weights.size(1),
             "T times K of weights");
  check_device(op, "weights", weights, rows);
}

Tensor merge_rows(const Tensor& rows, const Tensor& slots, const Tensor& weights) {
  constexpr const char* kOp = "merge_rows";
  check_merge(kOp, rows, slots, weights);
  const Tensor out =
      empty_like_device<2>(rows, {weights.size(0), rows.size(1)}, rows.scalar_type());
  if (out.numel() == 0) return out;
  const LaunchScope scope(kOp, rows);
  const Tensor from = with_dense_rows(rows);
  const Tensor scale = as_contiguous(weights);
  const Tensor dense_slots = as_contiguous(slots);
  check_slots(kOp, dense_slots, true, scope.stream());
  const Tensor inverse = inverse_of(kOp, dense_slots, scope.stream());
  by_dtype(rows.scalar_type(), [&]<class T>() {
    launch_merge<T>(kOp, from, inverse, &scale, out, static_cast<int>(weights.size(1)),
                    scope.stream());
  });
  return out;
}

std::tuple<Tensor, Tensor> merge_rows_backward(const Tensor& grad, const Tensor& rows,
                                               const Tensor& slots, const Tensor& weights) {
  constexpr const char* kOp = "merge_rows_backward";
  check_merge(kOp, rows, slots, weights);
  check_dim(kOp, "grad", grad, "T, H");
  check_dtype(kOp, "grad", grad, {rows.scalar_type()}, "as rows");
  check_size(kOp, "grad", "T", grad.size(0), weights.size(0), "as weights");
  check_size(kOp, "grad", "H", grad.size(1), rows.size(1), "as rows");
  check_device(kOp, "grad", grad, rows);

  const Tensor grad_rows =
      empty_like_device<2>(rows, {rows.size(0), rows.size(1)}, rows.scalar_type());
  const Tensor grad_weights =
      empty_like_device<2>(weights, {weights.size(0), weights.size(1)}, weights.scalar_type());
  if (weights.numel() == 0) return {grad_rows, grad_weights};
  const LaunchScope scope(kOp, rows);
  const Tensor dense_grad = with_dense_rows(grad);
  const Tensor dense_rows = with_dense_rows(rows);
  const Tensor dense_slots = as_contiguous(slots);
  const Tensor scale = as_contiguous(weights);
  check_slots(kOp, dense_slots, true, scope.stream());
  const Tensor inverse = inverse_of(kOp, dense_slots, scope.stream());
  by_dtype(rows.scalar_type(), [&]<class T>() {
    const MergeBackward<T> args{static_cast<const T*>(dense_grad.const_data_ptr()),
                                dense_grad.stride(0),
                                static_cast<const T*>(dense_rows.const_data_ptr()),
                                dense_rows.stride(0),
                                static_cast<const int*>(dense_slots.const_data_ptr()),
                                static_cast<const int*>(inverse.const_data_ptr()),
                                static_cast<const Accumulator<T>*>(scale.const_data_ptr()),
                                static_cast<T*>(grad_rows.mutable_data_ptr()),
                                static_cast<Accumulator<T>*>(grad_weights.mutable_data_ptr()),
                                static_cast<int>(slots.numel()),
                                static_cast<int>(weights.size(1)),
                                rows.size(1)};
    constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
    constexpr int kWarps = kRowThreads / 32;
    const auto blocks = static_cast<unsigned>((slots.numel() + kWarps - 1) / kWarps);
    if (aligned(dense_grad, kVectorBytes) && aligned(dense_rows, kVectorBytes)) {
      merge_rows_backward_kernel<T, kWide><<<blocks, kRowThreads, 0, scope.stream()>>>(args);
    } else {
      merge_rows_backward_kernel<T, 1><<<blocks, kRowThreads, 0, scope.stream()>>>(args);
    }
    check_launch(kOp, "merge_rows_backward_kernel");
  });
  return {grad_rows, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) {
  m.impl("slice_rows_backward", TORCH_BOX(&slice_rows_backward));
  m.impl("merge_rows", TORCH_BOX(&merge_rows));
  m.impl("merge_rows_backward", TORCH_BOX(&merge_rows_backward));
}

}  // namespace
}  // namespace ppmoe
