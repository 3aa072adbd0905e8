// expert_ffn_forward: two passes, products with an activation and products that are merged.
#include "cpu/expert_slice/ffn_plan.h"

namespace ppmoe::expert_slice {

std::tuple<Tensor, Tensor> expert_ffn_forward(Tensor x, Tensor slots, Tensor offsets,
                                              Tensor weights, Tensor w_in,
                                              std::optional<Tensor> b_in, Tensor w_out,
                                              std::optional<Tensor> b_out, StringHandle activation,
                                              bool save) {
  const char* op = "expert_ffn";
  const FfnArguments a(op, x, slots, offsets, weights, w_in, w_out, b_out, activation);
  if (b_in.has_value()) {
    const char* axis = a.gated ? "2F" : "F";
    check_dim(op, "b_in", *b_in, a.gated ? "L, 2F" : "L, F");
    check_dtype(op, "b_in", *b_in, {a.x.scalar_type()}, "as x");
    check_size(op, "b_in", "L", b_in->size(0), w_in.size(0), "as w_in");
    check_size(op, "b_in", axis, b_in->size(1), w_in.size(1), "as w_in");
    b_in = closed(*b_in);
  }
  const int64_t hidden = a.hidden(), width = a.width();
  const FfnPlan plan(a, width, 1);
  const ScalarType dtype = a.x.scalar_type();
  Tensor out = new_tensor({a.tokens(), hidden}, dtype);
  Tensor pre = new_tensor({save ? a.reserved() : 0, a.inner()}, dtype);
  Bytes panels = aligned_bytes(plan.panel_bytes);
  const int64_t products = plan.local() * hidden * width;

  const bool plain = w_out.stride(2) == 1;
  const FfnIn in{a.x.const_data_ptr(),
                 a.x.stride(0),
                 plan.tokens.data(),
                 {w_in.const_data_ptr(), w_in.stride(0), w_in.stride(1), w_in.stride(2)},
                 b_in.has_value() ? b_in->const_data_ptr() : nullptr,
                 plain,
                 save ? pre.mutable_data_ptr() : nullptr,
                 panels.get(),
                 a.dtype(),
                 a.activation,
                 a.gated,
                 hidden,
                 width};
  const std::vector<BlockTask> first =
      cut_columns(plan.blocks, width, a.gated ? kSlabColumns / 2 : kSlabColumns);
  int64_t scratch = 0;
  for (const FfnBlock& block : plan.blocks) {
    scratch = std::max(scratch, kernels().ffn_in_scratch(in, block));
  }
  run_tasks(static_cast<int64_t>(first.size()), products, scratch, [&](int64_t i, char* memory) {
    const BlockTask& task = first[i];
    kernels().ffn_in(in, plan.blocks[task.block], task.column, task.columns, memory);
  });

  const FfnOut merge{panels.get(),
                     width,
                     1,
                     {w_out.const_data_ptr(), w_out.stride(0), w_out.stride(2), w_out.stride(1)},
                     a.b_out.has_value() ? a.b_out->const_data_ptr() : nullptr,
                     plain,
                     plan.tokens.data(),
                     plan.weights.get(),
                     out.mutable_data_ptr(),
                     a.dtype(),
                     hidden};
  const std::vector<FfnOutTask> second = cut_merge(plan, hidden);
  scratch = 0;
  for (const FfnOutTask& task : second) {
    scratch = std::max(scratch, kernels().ffn_out_scratch(merge, task));
  }
  run_tasks(static_cast<int64_t>(second.size()), products, scratch,
            [&](int64_t i, char* memory) { kernels().ffn_out(merge, second[i], memory); });
  return {out, pre};
}

}  // namespace ppmoe::expert_slice
