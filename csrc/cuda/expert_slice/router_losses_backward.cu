// The gradient of router_losses to the logits on CUDA: a warp a token, one launch.

#include <torch/csrc/stable/library.h>

#include "route_keys.cuh"
#include "routing.cuh"

namespace ppmoe {
namespace {

constexpr const char* kOp = "router_losses_backward";
constexpr int kThreads = 128;

template <class T>
struct LossesBackward {
  using W = Accumulator<T>;
  const W* grad_balance;
  const W* grad_z;
  W balance_factor;
  W z_factor;
  const T* logits;  // [T, E]
  int64_t stride;
  const W* shares;  // [E]
  const W* lse;     // [T]
  T* out;           // [T, E]
  int64_t tokens;
  int experts;
};

// Fewest bytes: T*E logits, T log-sum-exps and E shares read, T*E written.
template <class T, int kStep>
__global__ void __launch_bounds__(kThreads, 8) losses_backward_kernel(const LossesBackward<T> a) {
  using W = Accumulator<T>;
  using V = Vec<T, kStep>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (t >= a.tokens) return;
  const T* row = a.logits + t * a.stride;
  T* out = a.out + t * a.experts;
  const W lse = a.lse[t];
  const W balance = *a.grad_balance * a.balance_factor;
  const W z = *a.grad_z * a.z_factor;
  W mean = 0;
#pragma unroll 1
  for (int e = lane * kStep; e < a.experts; e += 32 * kStep) {
    const V x = load<V>(row + e);
#pragma unroll
    for (int i = 0; i < kStep; ++i) mean += exponential(widen(x.lane[i]) - lse) * a.shares[e + i];
  }
  mean = warp_sum(mean);
  // p * (balance * (share - mean share) + z * lse), the row's constants taken together.
  const W constant = z * lse - balance * mean;
#pragma unroll 1
  for (int e = lane * kStep; e < a.experts; e += 32 * kStep) {
    V x = load<V>(row + e);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const W p = exponential(widen(x.lane[i]) - lse);
      x.lane[i] = narrow<T>(p * (a.shares[e + i] * balance + constant));
    }
    store(out + e, x);
  }
}

Tensor router_losses_backward(const Tensor& grad_balance, const Tensor& grad_z,
                              const Tensor& logits, const Tensor& shares, const Tensor& lse) {
  check_dim(kOp, "logits", logits, "T, E");
  check_dtype(kOp, "logits", logits, kFloats);
  check_dim(kOp, "shares", shares, "E");
  check_size(kOp, "shares", "E", shares.size(0), logits.size(1), "as logits");
  check_dim(kOp, "lse", lse, "T");
  check_size(kOp, "lse", "T", lse.size(0), logits.size(0), "as logits");
  const ScalarType wide = wide_dtype(logits.scalar_type());
  check_size(kOp, "grad_balance", "elements", grad_balance.numel(), 1, "a scalar");
  check_dtype(kOp, "grad_balance", grad_balance, {wide}, "as the losses");
  check_size(kOp, "grad_z", "elements", grad_z.numel(), 1, "a scalar");
  check_dtype(kOp, "grad_z", grad_z, {wide}, "as the losses");
  check_dtype(kOp, "shares", shares, {wide}, "as the losses");
  check_dtype(kOp, "lse", lse, {wide}, "as the losses");
  check_device(kOp, "grad_balance", grad_balance, logits);
  check_device(kOp, "grad_z", grad_z, logits);
  check_device(kOp, "shares", shares, logits);
  check_device(kOp, "lse", lse, logits);

  const int64_t tokens = logits.size(0);
  const Tensor out = empty_like_device<2>(logits, {tokens, logits.size(1)}, logits.scalar_type());
  if (out.numel() == 0) return out;
  const LaunchScope scope(kOp, logits);
  const Tensor rows = with_dense_rows(logits);
  const Tensor dense_shares = as_contiguous(shares);
  const Tensor dense_lse = as_contiguous(lse);
  by_dtype(rows.scalar_type(), [&]<class T>() {
    using W = Accumulator<T>;
    const LossesBackward<T> args{static_cast<const W*>(grad_balance.const_data_ptr()),
                                 static_cast<const W*>(grad_z.const_data_ptr()),
                                 static_cast<W>(static_cast<double>(rows.size(1)) / rows.size(0)),
                                 static_cast<W>(2.0 / rows.size(0)),
                                 static_cast<const T*>(rows.const_data_ptr()),
                                 rows.stride(0),
                                 static_cast<const W*>(dense_shares.const_data_ptr()),
                                 static_cast<const W*>(dense_lse.const_data_ptr()),
                                 static_cast<T*>(out.mutable_data_ptr()),
                                 tokens,
                                 static_cast<int>(rows.size(1))};
    constexpr int kStep = kVectorBytes / static_cast<int>(sizeof(T));
    constexpr int kWarps = kThreads / 32;
    const auto blocks = static_cast<unsigned>((tokens + kWarps - 1) / kWarps);
    if (aligned(rows, kVectorBytes) && aligned(out, kVectorBytes)) {
      losses_backward_kernel<T, kStep><<<blocks, kThreads, 0, scope.stream()>>>(args);
    } else {
      losses_backward_kernel<T, 1><<<blocks, kThreads, 0, scope.stream()>>>(args);
    }
    check_launch(kOp, "losses_backward_kernel");
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) {
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
}

}  // namespace
}  // namespace ppmoe
