// expert_ffn_backward: the gradient of the pre-activation first, then all that follows from it.
#include "cpu/expert_slice/ffn_plan.h"

namespace ppmoe::expert_slice {
namespace {

// A part of one expert's weight gradient.
struct WeightTask {
  int64_t expert, row, rows;
};

// Blocks of rows of every expert's gradient [rows, ...].
std::vector<WeightTask> cut_rows(const FfnPlan& plan, int64_t rows) {
  std::vector<WeightTask> tasks;
  const int64_t cuts = std::max<int64_t>(1, ceil_div(rows, kBlockRows));
  const int64_t each =
      std::max(kPanelRows, ceil_div(ceil_div(rows, cuts), kPanelRows) * kPanelRows);
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(plan.bounds.size()); ++e) {
    for (int64_t row = 0; row < rows; row += each) {
      tasks.push_back({e, row, std::min(each, rows - row)});
    }
  }
  return tasks;
}

char* at(const Tensor& tensor, int64_t offset) {
  return data<char>(tensor) + offset * tensor.element_size();
}

const char* element(const void* base, int64_t offset, int64_t size) {
  return static_cast<const char*>(base) + offset * size;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Tensor grad, Tensor x, Tensor slots, Tensor offsets, Tensor weights, Tensor w_in, Tensor w_out,
    std::optional<Tensor> b_out, Tensor pre, StringHandle activation, bool need_x,
    bool need_weights, bool need_w_in, bool need_b_in, bool need_w_out, bool need_b_out) {
  const char* op = "expert_ffn_backward";
  const FfnArguments a(op, x, slots, offsets, weights, w_in, w_out, b_out, activation);
  const ScalarType dtype = a.x.scalar_type();
  check_dim(op, "grad", grad, "T, H");
  check_dtype(op, "grad", grad, {dtype}, "as x");
  check_size(op, "grad", "T", grad.size(0), x.size(0), "as x");
  check_size(op, "grad", "H", grad.size(1), x.size(1), "as x");
  check_dim(op, "pre", pre, "R, F");
  check_dtype(op, "pre", pre, {dtype}, "as x");
  check_size(op, "pre", "R", pre.size(0), a.reserved(), "T * min(K, L)");
  check_size(op, "pre", "F", pre.size(1), w_in.size(1), "as w_in");
  grad = with_closed_rows(grad);
  pre = closed(pre);
  const int64_t hidden = a.hidden(), width = a.width(), inner = a.inner(), experts = a.experts();
  const int64_t size = a.x.element_size(), halves = a.gated ? 2 : 1;
  const DType kind = a.dtype();
  const FfnPlan plan(a, width, halves);
  const int64_t rows = plan.bounds.back(), products = plan.local() * hidden * width;

  const auto result = [&](bool need, std::initializer_list<int64_t> sizes, ScalarType type) {
    return need ? new_tensor(sizes, type) : new_tensor({0}, type);
  };
  Tensor grad_x = result(need_x, {a.tokens(), hidden}, dtype);
  Tensor grad_weights = result(need_weights, {a.tokens(), a.top_k()}, weights.scalar_type());
  Tensor grad_w_in = result(need_w_in, {experts, inner, hidden}, dtype);
  Tensor grad_b_in = result(need_b_in, {experts, inner}, dtype);
  Tensor grad_w_out = result(need_w_out, {experts, hidden, width}, dtype);
  Tensor grad_b_out = result(need_b_out, {experts, hidden}, dtype);

  const int64_t wide = wide_dtype(dtype) == ScalarType::Double ? 8 : 4;
  const int64_t dot_slabs = ceil_div(width, kSlabColumns);
  Bytes grad_pre = aligned_bytes(rows * inner * size);
  Bytes activated = aligned_bytes(need_w_out ? rows * width * size : 0);
  Bytes dots = aligned_bytes(need_weights ? rows * dot_slabs * wide : 0);
  Bytes panels = aligned_bytes(need_x ? plan.panel_bytes : 0);
  if (need_x || need_weights || need_w_in || need_b_in || need_w_out) {
    const FfnInBackward in{
        grad.const_data_ptr(),
        grad.stride(0),
        plan.tokens.data(),
        plan.weights.get(),
        {w_out.const_data_ptr(), w_out.stride(0), w_out.stride(1), w_out.stride(2)},
        pre.const_data_ptr(),
        grad_pre.get(),
        need_x ? panels.get() : nullptr,
        need_w_out ? activated.get() : nullptr,
        need_weights ? dots.get() : nullptr,
        dot_slabs,
        kind,
        a.activation,
        a.gated,
        hidden,
        width};
    const std::vector<BlockTask> tasks = cut_columns(plan.blocks, width, kSlabColumns);
    int64_t scratch = 0;
    for (const FfnBlock& block : plan.blocks) {
      scratch = std::max(scratch, kernels().ffn_in_backward_scratch(in, block));
    }
    run_tasks(static_cast<int64_t>(tasks.size()), products, scratch, [&](int64_t i, char* memory) {
      const BlockTask& task = tasks[i];
      kernels().ffn_in_backward(in, plan.blocks[task.block], task.column, task.columns, memory);
    });
  }

  const FfnOut merge{panels.get(),
                     width,
                     halves,
                     {w_in.const_data_ptr(), w_in.stride(0), w_in.stride(1), w_in.stride(2)},
                     nullptr,
                     false,
                     plan.tokens.data(),
                     nullptr,
                     need_x ? grad_x.mutable_data_ptr() : nullptr,
                     kind,
                     hidden};
  const Tensor slots_closed = closed(a.slots);
  const FfnWeightsBackward dot{dots.get(),
                               dot_slabs,
                               grad.const_data_ptr(),
                               grad.stride(0),
                               plan.tokens.data(),
                               data<int32_t>(slots_closed),
                               a.b_out.has_value() ? a.b_out->const_data_ptr() : nullptr,
                               need_weights ? grad_weights.mutable_data_ptr() : nullptr,
                               kind,
                               hidden};
  if (need_weights) {
    std::fill_n(data<char>(grad_weights), grad_weights.numel() * grad_weights.element_size(), 0);
  }
  // w_in's gradient: grad_pre^T @ x; w_out's: grad^T @ activated.
  const auto w_in_gemm = [&](const WeightTask& task) {
    const int64_t low = plan.bounds[task.expert];
    return Gemm{{element(grad_pre.get(), low * inner + task.row, size), 1, inner},
                {a.x.const_data_ptr(), a.x.stride(0), 1, plan.tokens.data() + low},
                at(grad_w_in, (task.expert * inner + task.row) * hidden),
                hidden,
                nullptr,
                kind,
                task.rows,
                hidden,
                plan.rows(task.expert),
                inner,
                grad_w_in.numel() * size > kWeightStreamBytes};
  };
  const auto w_out_gemm = [&](const WeightTask& task) {
    const int64_t low = plan.bounds[task.expert];
    return Gemm{{element(grad.const_data_ptr(), task.row, size), 1, grad.stride(0), nullptr,
                 plan.tokens.data() + low},
                {element(activated.get(), low * width, size), width, 1},
                at(grad_w_out, (task.expert * hidden + task.row) * width),
                width,
                nullptr,
                kind,
                task.rows,
                width,
                plan.rows(task.expert),
                hidden,
                grad_w_out.numel() * size > kWeightStreamBytes};
  };
  const auto multiply = [&](const Gemm& gemm, char* memory) {
    if (gemm.k > 0) return kernels().gemm(gemm, memory);
    std::fill_n(static_cast<char*>(gemm.c), gemm.m * gemm.n * size, 0);
  };

  const std::vector<FfnOutTask> x_tasks =
      need_x ? cut_merge(plan, hidden) : std::vector<FfnOutTask>();
  const std::vector<WeightTask> in_tasks =
      need_w_in ? cut_rows(plan, inner) : std::vector<WeightTask>();
  const std::vector<WeightTask> out_tasks =
      need_w_out ? cut_rows(plan, hidden) : std::vector<WeightTask>();
  int64_t scratch = 0;
  for (const FfnOutTask& task : x_tasks) {
    scratch = std::max(scratch, kernels().ffn_out_scratch(merge, task));
  }
  for (const WeightTask& task : in_tasks) {
    if (plan.rows(task.expert) > 0) {
      scratch = std::max(scratch, kernels().gemm_scratch(w_in_gemm(task)));
    }
  }
  for (const WeightTask& task : out_tasks) {
    if (plan.rows(task.expert) > 0) {
      scratch = std::max(scratch, kernels().gemm_scratch(w_out_gemm(task)));
    }
  }
  // One list of everything that is left, so that the threads wait for each other once.
  const int64_t x_end = static_cast<int64_t>(x_tasks.size());
  const int64_t in_end = x_end + static_cast<int64_t>(in_tasks.size());
  const int64_t out_end = in_end + static_cast<int64_t>(out_tasks.size());
  const int64_t b_in_end = out_end + (need_b_in ? experts : 0);
  const int64_t b_out_end = b_in_end + (need_b_out ? experts : 0);
  const int64_t end = b_out_end + (need_weights ? static_cast<int64_t>(plan.blocks.size()) : 0);
  run_tasks(end, products, scratch, [&](int64_t i, char* memory) {
    if (i < x_end) return kernels().ffn_out(merge, x_tasks[i], memory);
    if (i < in_end) return multiply(w_in_gemm(in_tasks[i - x_end]), memory);
    if (i < out_end) return multiply(w_out_gemm(out_tasks[i - in_end]), memory);
    if (i < b_in_end) {
      const int64_t e = i - out_end, low = plan.bounds[e];
      const Matrix part{element(grad_pre.get(), low * inner, size), inner, 1};
      return kernels().column_sums(part, nullptr, kind, plan.rows(e), inner,
                                   at(grad_b_in, e * inner));
    }
    if (i < b_out_end) {
      const int64_t e = i - b_in_end, low = plan.bounds[e];
      const Matrix part{grad.const_data_ptr(), grad.stride(0), 1, plan.tokens.data() + low};
      return kernels().column_sums(part, plan.weights.get() + low * wide, kind, plan.rows(e),
                                   hidden, at(grad_b_out, e * hidden));
    }
    kernels().ffn_weights_backward(dot, plan.blocks[i - b_out_end]);
  });
  return {grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace ppmoe::expert_slice
