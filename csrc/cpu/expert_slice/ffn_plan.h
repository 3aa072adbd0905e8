// What expert_ffn and its backward share: checked arguments, rows, and the cut into blocks.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu/expert_slice/ops.h"

namespace ppmoe::expert_slice {

struct FfnArguments {
  const char* op;
  Tensor x, slots, offsets, weights, w_in, w_out;
  std::optional<Tensor> b_out;
  std::string activation_name;
  Activation activation;
  bool gated;

  // Throws where an argument is not as the contract says.
  FfnArguments(const char* op, Tensor x, Tensor slots, Tensor offsets, Tensor weights, Tensor w_in,
               Tensor w_out, std::optional<Tensor> b_out, StringHandle activation);

  int64_t tokens() const { return x.size(0); }
  int64_t hidden() const { return x.size(1); }
  int64_t width() const { return w_out.size(2); }
  int64_t inner() const { return w_in.size(1); }  // F, or 2F where there is a gate
  int64_t experts() const { return w_out.size(0); }
  int64_t top_k() const { return weights.size(1); }
  int64_t reserved() const { return tokens() * std::min(top_k(), experts()); }
  DType dtype() const { return kernel_dtype(x.scalar_type()); }
};

// Blocks of some tokens, for one pass of merging.
struct Chunk {
  int64_t first_block, blocks, first_token, tokens;
};

// The rows of the local slots, in the order of slots, and how they are cut.
struct FfnPlan {
  std::vector<int64_t> bounds;  // of every expert's rows
  std::vector<int32_t> tokens;  // of every row
  Bytes weights;                // of every row: float, or double for float64
  std::vector<FfnBlock> blocks;
  std::vector<Chunk> chunks;
  int64_t panel_bytes = 0;

  // `depth` and `parts` are those of the rows that the second product packs.
  FfnPlan(const FfnArguments& a, int64_t depth, int64_t parts);

  int64_t rows(int64_t expert) const { return bounds[expert + 1] - bounds[expert]; }
  int64_t local() const { return bounds.back() - bounds.front(); }
};

// A block and the columns that one thread makes of it.
struct BlockTask {
  int64_t block, column, columns;
};

// Tasks that cover `columns` columns of every block, the largest first.
std::vector<BlockTask> cut_columns(const std::vector<FfnBlock>& blocks, int64_t columns,
                                   int64_t step);

// Tasks that cover all columns of every chunk.
std::vector<FfnOutTask> cut_merge(const FfnPlan& plan, int64_t columns);

}  // namespace ppmoe::expert_slice
