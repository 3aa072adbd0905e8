// ladder_block: checks, and how its images are shared out.
#include "cpu/ladder_attention/block_ops.h"

#include <algorithm>

#include "cpu/ladder_attention/block_plan.h"

namespace ppmoe::ladder_attention {
namespace {

constexpr const char* kOp = "ladder_block";
// Images that one thread takes through the whole block together have about so many pixels.
constexpr int64_t kChunkPixels = 192;
constexpr int64_t kChunksPerThread = 2;

constexpr const char* kPartNames[kBlockParts] = {
    "ln1_w", "ln1_b", "w_in", "b_in", "bias_table", "w_out",  "b_out", "ln2_w",
    "ln2_b", "f1_w",  "f1_b", "dw_w", "dw_b",       "dw_off", "f2_w",  "f2_b",
};
constexpr const char* kFusionNames[] = {"w1", "b1", "w2", "b2", "wp", "bp"};

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void check_parameter(const Tensor& tensor, int64_t index, const Tensor& x,
                     const std::vector<int64_t>& shape) {
  const bool branch = index < kBlockFusion;
  const int64_t part = index % kBlockParts;
  const auto label = [&] {
    if (!branch)
      return concat("params[", index, "] (fusion ", kFusionNames[index - kBlockFusion], ")");
    return concat("params[", index, "] (branch ", index / kBlockParts, " ", kPartNames[part], ")");
  };
  const bool wide = branch && (part == kLn1W || part == kLn1B || part == kTable || part == kLn2W ||
                               part == kLn2B);
  const ScalarType own = x.scalar_type(), came = tensor.scalar_type();
  if (wide && came != own) check_wide(kOp, label().c_str(), tensor, x);
  if (!wide && came != own) check_dtype(kOp, label().c_str(), tensor, {own}, "as x");
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    bad_value(kOp, ": ", label(), " has shape ", text_of({sizes.begin(), sizes.end()}),
              "; expected ", text_of(shape));
  }
}

void check_block(const Tensor& x, const std::vector<Tensor>& params, int64_t heads,
                 const Pair& window, const Pair& shift) {
  check_dim(kOp, "x", x, "B, H, W, C");
  check_dtype(kOp, "x", x, kFloats);
  const int64_t c = x.size(3), g = c / kBranches;
  if (c % kBranches != 0) {
    bad_value(kOp, ": x has C = ", c, "; expected a multiple of 3 (three branches)");
  }
  check_windows(kOp, g, heads, window, shift);
  if (static_cast<int64_t>(params.size()) != kBlockTensors) {
    bad_value(kOp, ": params has ", params.size(), " tensors; expected ", kBlockTensors,
              " (three times 16 of a branch, 6 of the fusion)");
  }
  const int64_t d = params[kBlockFusion].dim() == 2 ? params[kBlockFusion].size(0) : 0;
  const int64_t table = (2 * window[0] - 1) * (2 * window[1] - 1);
  for (int64_t index = 0; index < kBlockFusion; ++index) {
    const int64_t outputs = (index < kBlockParts ? 3 : 2) * g;
    const std::vector<int64_t> shapes[kBlockParts] = {
        {g},    {g}, {outputs, g}, {outputs}, {table, heads}, {g, g}, {g}, {g}, {g},
        {g, g}, {g}, {g, 3, 3},    {g},       {g, 3, 3},      {g, g}, {g}};
    check_parameter(params[static_cast<size_t>(index)], index, x, shapes[index % kBlockParts]);
  }
  const std::vector<int64_t> shapes[] = {{d, c}, {d}, {c, d}, {c}, {c, c}, {c}};
  for (int64_t i = 0; i < 6; ++i) {
    check_parameter(params[static_cast<size_t>(kBlockFusion + i)], kBlockFusion + i, x, shapes[i]);
  }
}

// In a dtype that products have to widen, all of it is done wide.
Tensor run_wide(const Tensor& x, std::vector<Tensor> params, int64_t heads, const Pair& window,
                const Pair& shift) {
  for (Tensor& each : params) each = torch::stable::to(each, ScalarType::Float);
  const Tensor wide = ladder_block(torch::stable::to(x, ScalarType::Float), std::move(params),
                                   heads, window, shift);
  return torch::stable::to(wide, x.scalar_type());
}

}  // namespace

Tensor ladder_block(Tensor x, std::vector<Tensor> params, int64_t num_heads, Pair window,
                    Pair shift) {
  check_block(x, params, num_heads, window, shift);
  const int64_t images = x.size(0), pixels = x.size(1) * x.size(2);
  const DType dtype = kernel_dtype(x.scalar_type());
  if (x.numel() > 0 && kernels().attention.packed_dtype(dtype) != dtype) {
    return run_wide(x, std::move(params), num_heads, window, shift);
  }
  Tensor out = new_tensor({images, x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const Block block(x, out, params, num_heads, window, shift);
  const int64_t share = images / (kChunksPerThread * torch::stable::get_num_threads());
  if (share == 0) {
    block.run_together();
  } else {
    block.run_apart(std::min(share, ceil_div(kChunkPixels, pixels)));
  }
  return out;
}

}  // namespace ppmoe::ladder_attention
