// slice_rows on CUDA: a copy of whole rows, in the widest loads that the addresses allow.

#include <torch/csrc/stable/library.h>

#include "rows.cuh"

namespace ppmoe {
namespace {

constexpr const char* kOp = "slice_rows";
constexpr int kCopyRows = 4;  // rows a thread copies at once

// Fewest bytes: U distinct source rows read, T*K rows written, T*K int32 read.
template <class Unit>
__global__ void __launch_bounds__(kRowThreads)
    slice_rows_kernel(const Unit* __restrict__ x, int64_t x_stride, const int* __restrict__ slots,
                      Unit* __restrict__ out, int count, int top_k, int64_t units) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kCopyRows + threadIdx.y;
  int64_t from[kCopyRows];
#pragma unroll
  for (int r = 0; r < kCopyRows; ++r) {
    const int64_t row = first + static_cast<int64_t>(r) * blockDim.y;
    const int slot = row < count ? slots[row] : -1;
    from[r] = valid(slot, count) ? slot / top_k : -1;
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t u = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; u < units;
       u += step) {
    Unit value[kCopyRows];
#pragma unroll
    for (int r = 0; r < kCopyRows; ++r) {
      value[r] = from[r] >= 0 ? x[from[r] * x_stride + u] : Unit{};
    }
#pragma unroll
    for (int r = 0; r < kCopyRows; ++r) {
      const int64_t row = first + static_cast<int64_t>(r) * blockDim.y;
      if (row < count) out[row * units + u] = value[r];
    }
  }
}

template <class Unit>
void launch_slice(const Tensor& x, const Tensor& slots, const Tensor& out, int top_k,
                  cudaStream_t stream) {
  const auto size = static_cast<int64_t>(x.element_size());
  const auto unit = static_cast<int64_t>(sizeof(Unit));
  const int64_t units = x.size(1) * size / unit;
  const RowShape shape(slots.numel(), units, kCopyRows);
  slice_rows_kernel<Unit><<<shape.grid, shape.block, 0, stream>>>(
      static_cast<const Unit*>(x.const_data_ptr()), x.stride(0) * size / unit,
      static_cast<const int*>(slots.const_data_ptr()), static_cast<Unit*>(out.mutable_data_ptr()),
      static_cast<int>(slots.numel()), top_k, units);
  check_launch(kOp, "slice_rows_kernel");
}

Tensor slice_rows(const Tensor& x, const Tensor& slots, int64_t top_k) {
  check_dim(kOp, "x", x, "T, H");
  check_dtype(kOp, "x", x, kFloats);
  check_between(kOp, "top_k", top_k, 1, INT_MAX);
  check_slots_argument(kOp, slots, x, x.size(0) * top_k, "T of x times top_k");

  const Tensor out = empty_like_device<2>(x, {slots.numel(), x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const LaunchScope scope(kOp, x);
  const Tensor from = with_dense_rows(x);
  const Tensor dense_slots = as_contiguous(slots);
  check_slots(kOp, dense_slots, false, scope.stream());
  const auto run = [&]<class Unit>() {
    launch_slice<Unit>(from, dense_slots, out, static_cast<int>(top_k), scope.stream());
  };
  if (aligned(from, 16) && aligned(out, 16)) {
    run.template operator()<uint4>();
  } else if (aligned(from, 4) && aligned(out, 4)) {
    run.template operator()<uint32_t>();
  } else {
    run.template operator()<uint16_t>();
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) { m.impl("slice_rows", TORCH_BOX(&slice_rows)); }

}  // namespace
}  // namespace ppmoe
