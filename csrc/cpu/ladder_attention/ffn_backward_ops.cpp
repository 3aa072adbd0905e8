// ladder_ffn_backward: checks, and the phases of the backward.
#include "cpu/ladder_attention/ffn_ops.h"

namespace ppmoe::ladder_attention {
namespace {

constexpr FfnPhase kPhases[] = {
    FfnPhase::kIn,
    FfnPhase::kConvolve,
    FfnPhase::kProjectBackward,
    FfnPhase::kActivateBackward,
    FfnPhase::kConvolveBackward,
    FfnPhase::kInBackward,
};

Tensor like(const Tensor& tensor) {
  if (tensor.dim() == 1) return new_tensor({tensor.size(0)}, tensor.scalar_type());
  if (tensor.dim() == 2) return new_tensor({tensor.size(0), tensor.size(1)}, tensor.scalar_type());
  return new_tensor({tensor.size(0), tensor.size(1), tensor.size(2)}, tensor.scalar_type());
}

FfnResult result(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), kernel_dtype(tensor.scalar_type())};
}

void clear(const Tensor& tensor) {
  std::fill_n(data<char>(tensor), tensor.numel() * tensor.element_size(), 0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ladder_ffn_backward(Tensor grad, Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1,
                    Tensor dw_w, Tensor dw_b, Tensor w2, Tensor b2, Tensor bn_w, Tensor bn_b,
                    Tensor mean, Tensor var, std::optional<Tensor> row_scale, bool training,
                    double eps) {
  const char* op = "ladder_ffn_backward";
  FfnArguments a(op, x, ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b, row_scale, training);
  check_dim(op, "grad", grad, "B, H, W, g");
  check_dtype(op, "grad", grad, {a.dtype()}, "as x");
  static const char* const kAxes[] = {"B", "H", "W", "g"};
  for (int axis = 0; axis < 4; ++axis) {
    check_size(op, "grad", kAxes[axis], grad.size(axis), x.size(axis), "as x");
  }
  a.check_statistics("mean", mean, true);
  a.check_statistics("var", var, true);
  a.close();
  mean = closed(mean);
  var = closed(var);
  const FfnKernels& kernel = kernels().ffn;
  const int64_t g = a.channels(), pixels = a.pixels();
  Tensor grad_x = new_tensor({x.size(0), x.size(1), x.size(2), g}, a.dtype());
  const Tensor grads[] = {like(ln_w), like(ln_b), like(w1), like(b1),   like(dw_w),
                          like(dw_b), like(w2),   like(b2), like(bn_w), like(bn_b)};
  const auto results = [&] {
    return std::tuple{grad_x,   grads[0], grads[1], grads[2], grads[3], grads[4],
                      grads[5], grads[6], grads[7], grads[8], grads[9]};
  };
  if (pixels == 0) {
    for (const Tensor& each : grads) clear(each);
    return results();
  }

  FfnBackward b{};
  b.forward = a.describe(eps, mean, var);
  b.forward.training = false;  // its norms are those of the given statistics
  b.training = training;
  b.grad = map_of(grad);
  b.grad_x = grad_x.mutable_data_ptr();
  FfnResult* const places[] = {&b.ln_w, &b.ln_b, &b.w1, &b.b1,   &b.dw_w,
                               &b.dw_b, &b.w2,   &b.b2, &b.bn_w, &b.bn_b};
  for (size_t i = 0; i < std::size(places); ++i) *places[i] = result(grads[i]);

  const FfnBytes bytes = kernel.bytes(b.forward.dtype, g);
  const int64_t groups = ffn_groups(pixels), rows = bytes.row * pixels;
  b.apart = 2 * (x.size(2) + 1) > pixels / groups && x.size(1) > 1;
  const Bytes prepared = aligned_bytes(bytes.backward);
  b.forward.prepared = prepared.get();
  // One piece of memory: rows between the phases, then sums.
  char** const between[] = {&b.a1, &b.a2, &b.d1, &b.d2, &b.u1, &b.u2};
  const int64_t all_rows = static_cast<int64_t>(std::size(between)) * rows;
  const int64_t sums = groups * kFfnGradientSums * bytes.sums;
  const int64_t weight_sums = groups * g * bytes.sums;
  const Bytes memory = aligned_bytes(all_rows + sums + 2 * weight_sums);
  for (size_t i = 0; i < std::size(between); ++i) {
    *between[i] = memory.get() + static_cast<int64_t>(i) * rows;
  }
  b.sums = memory.get() + all_rows;
  b.w1_sums = b.sums + sums;
  b.w2_sums = b.w1_sums + weight_sums;

  kernel.backward_prepare(b);
  const int64_t products = pixels * g * g, scratch_bytes = kernel.backward_scratch(b);
  // Every other phase goes from the last group to the first: what was written last is still in a
  // cache.
  bool forward = true;
  for (const FfnPhase phase : kPhases) {
    if (phase == FfnPhase::kActivateBackward && !b.apart) continue;
    run_tasks(groups, products, scratch_bytes, [&](int64_t task, char* scratch) {
      kernel.backward(b, phase, forward ? task : groups - 1 - task, scratch);
    });
    kernel.backward_settle(b, phase);
    forward = !forward;
  }
  const int64_t blocks = ceil_div(g, kFfnWeightRows);
  run_tasks(2 * blocks, 2 * groups * g * g, 0, [&](int64_t task, char*) {
    const int64_t first = task % blocks * kFfnWeightRows;
    kernel.weight_gradient(b, task >= blocks, first, std::min(kFfnWeightRows, g - first));
  });
  return results();
}

}  // namespace ppmoe::ladder_attention
