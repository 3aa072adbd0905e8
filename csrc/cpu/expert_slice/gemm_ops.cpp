// grouped_linear: checks, and a cut of the experts' products into blocks for the threads.
#include <algorithm>
#include <vector>

#include "cpu/expert_slice/ops.h"

namespace ppmoe::expert_slice {
namespace {

// Columns are cut into as many parts as keep the threads busy. No result depends on a cut.
constexpr int64_t kBlocksPerThread = 4;

struct Block {
  int64_t expert, row, rows, column, columns;
};

void check_groups(const char* op, const Tensor& rows, const Tensor& offsets, const Tensor& weight) {
  check_dim(op, "rows", rows, "R, K_in");
  check_dtype(op, "rows", rows, kFloats);
  check_between(op, "R", rows.size(0), 0, INT32_MAX, "offsets are int32");
  check_dim(op, "weight", weight, "L, N, K_in");
  check_dtype(op, "weight", weight, {rows.scalar_type()}, "as rows");
  check_size(op, "weight", "K_in", weight.size(2), rows.size(1), "as rows");
  check_dim(op, "offsets", offsets, "L+1");
  check_dtype(op, "offsets", offsets, {ScalarType::Int});
  check_size(op, "offsets", "L+1", offsets.size(0), weight.size(0) + 1, "L of weight plus 1");
}

std::vector<int64_t> read_offsets(const char* op, const Tensor& offsets, int64_t rows) {
  const Tensor list = closed(offsets);
  const int32_t* bound = data<int32_t>(list);
  for (int64_t i = 0; i < list.numel(); ++i) {
    if (bound[i] < 0 || bound[i] > rows) {
      bad_index(op, ": offsets holds ", bound[i], "; allowed: 0 to ", rows);
    }
  }
  for (int64_t i = 1; i < list.numel(); ++i) {
    if (bound[i] < bound[i - 1]) {
      bad_value(op, ": offsets holds ", bound[i], " after ", bound[i - 1],
                "; allowed: values that do not decrease");
    }
  }
  return {bound, bound + list.numel()};
}

// The blocks of products of rows[e] x columns, one product an expert.
std::vector<Block> cut(const std::vector<int64_t>& rows, int64_t columns) {
  int64_t tall = 0;
  for (int64_t count : rows) tall += (count + kBlockRows - 1) / kBlockRows;
  if (tall == 0) return {};
  const int64_t steps = (columns + kSlabColumns - 1) / kSlabColumns;
  const int64_t enough = kBlocksPerThread * torch::stable::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>((enough + tall - 1) / tall, 1, std::max<int64_t>(steps, 1));
  const int64_t wide = (steps + parts - 1) / parts * kSlabColumns;
  std::vector<Block> blocks;
  for (int64_t expert = 0; expert < static_cast<int64_t>(rows.size()); ++expert) {
    for (int64_t row = 0; row < rows[expert]; row += kBlockRows) {
      for (int64_t column = 0; column < columns; column += wide) {
        blocks.push_back({expert, row, std::min(kBlockRows, rows[expert] - row), column,
                          std::min(wide, columns - column)});
      }
    }
  }
  return blocks;
}

std::vector<int64_t> lengths(const std::vector<int64_t>& bounds) {
  std::vector<int64_t> counts;
  for (size_t e = 0; e + 1 < bounds.size(); ++e) counts.push_back(bounds[e + 1] - bounds[e]);
  return counts;
}

// Runs one product a block; make(block) describes it.
template <class F>
void run_blocks(const std::vector<Block>& blocks, const F& make) {
  int64_t scratch_bytes = 0, products = 0;
  for (const Block& block : blocks) {
    const Gemm gemm = make(block);
    scratch_bytes = std::max(scratch_bytes, kernels().gemm_scratch(gemm));
    products += gemm.m * gemm.n * gemm.k;
  }
  const auto run = [&](int64_t task, char* scratch) {
    kernels().gemm(make(blocks[static_cast<size_t>(task)]), scratch);
  };
  run_tasks(static_cast<int64_t>(blocks.size()), products, scratch_bytes, run);
}

Matrix matrix(const Tensor& tensor, int64_t offset, int64_t row_stride, int64_t col_stride) {
  return {static_cast<const char*>(tensor.const_data_ptr()) + offset * tensor.element_size(),
          row_stride, col_stride};
}

char* at(const Tensor& tensor, int64_t offset) {
  return data<char>(tensor) + offset * tensor.element_size();
}

// Zeros for the rows of no expert.
void clear_rest(const Tensor& out, const std::vector<int64_t>& bounds) {
  const int64_t bytes = out.size(1) * out.element_size();
  std::fill_n(data<char>(out), bounds.front() * bytes, 0);
  std::fill_n(data<char>(out) + bounds.back() * bytes, (out.size(0) - bounds.back()) * bytes, 0);
}

}  // namespace

Tensor grouped_linear(Tensor rows, Tensor offsets, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "grouped_linear";
  check_groups(op, rows, offsets, weight);
  const int64_t experts = weight.size(0), width = weight.size(1), depth = weight.size(2);
  if (bias.has_value()) {
    check_dim(op, "bias", *bias, "L, N");
    check_dtype(op, "bias", *bias, {rows.scalar_type()}, "as rows");
    check_size(op, "bias", "L", bias->size(0), experts, "as weight");
    check_size(op, "bias", "N", bias->size(1), width, "as weight");
    bias = closed(*bias);
  }
  const std::vector<int64_t> bounds = read_offsets(op, offsets, rows.size(0));
  Tensor out = new_tensor({rows.size(0), width}, rows.scalar_type());
  clear_rest(out, bounds);
  run_blocks(cut(lengths(bounds), width), [&](const Block& block) {
    const int64_t row = bounds[block.expert] + block.row;
    const int64_t first = block.expert * weight.stride(0) + block.column * weight.stride(1);
    return Gemm{matrix(rows, row * rows.stride(0), rows.stride(0), rows.stride(1)),
                matrix(weight, first, weight.stride(2), weight.stride(1)),
                at(out, row * width + block.column),
                width,
                bias.has_value() ? at(*bias, block.expert * width + block.column) : nullptr,
                kernel_dtype(rows.scalar_type()),
                block.rows,
                block.columns,
                depth,
                bounds[block.expert + 1] - bounds[block.expert],
                false};
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor grad, Tensor rows, Tensor offsets,
                                                           Tensor weight, bool need_rows,
                                                           bool need_weight, bool need_bias) {
  const char* op = "grouped_linear_backward";
  check_groups(op, rows, offsets, weight);
  check_dim(op, "grad", grad, "R, N");
  check_dtype(op, "grad", grad, {rows.scalar_type()}, "as rows");
  check_size(op, "grad", "R", grad.size(0), rows.size(0), "as rows");
  check_size(op, "grad", "N", grad.size(1), weight.size(1), "as weight");
  const std::vector<int64_t> bounds = read_offsets(op, offsets, rows.size(0));
  const int64_t experts = weight.size(0), width = weight.size(1), depth = weight.size(2);
  const ScalarType dtype = rows.scalar_type();
  const DType kind = kernel_dtype(dtype);
  Tensor grad_rows = need_rows ? new_tensor({rows.size(0), depth}, dtype) : new_tensor({0}, dtype);
  Tensor grad_weight =
      need_weight ? new_tensor({experts, width, depth}, dtype) : new_tensor({0}, dtype);
  Tensor grad_bias = need_bias ? new_tensor({experts, width}, dtype) : new_tensor({0}, dtype);
  if (need_rows) {
    clear_rest(grad_rows, bounds);
    run_blocks(cut(lengths(bounds), depth), [&](const Block& block) {
      const int64_t row = bounds[block.expert] + block.row;
      const int64_t first = block.expert * weight.stride(0) + block.column * weight.stride(2);
      return Gemm{matrix(grad, row * grad.stride(0), grad.stride(0), grad.stride(1)),
                  matrix(weight, first, weight.stride(1), weight.stride(2)),
                  at(grad_rows, row * depth + block.column),
                  depth,
                  nullptr,
                  kind,
                  block.rows,
                  block.columns,
                  width,
                  bounds[block.expert + 1] - bounds[block.expert],
                  false};
    });
  }
  if (need_weight) {
    const bool stream = grad_weight.numel() * grad_weight.element_size() > kWeightStreamBytes;
    run_blocks(cut(std::vector<int64_t>(experts, width), depth), [&](const Block& block) {
      const int64_t low = bounds[block.expert];
      return Gemm{matrix(grad, low * grad.stride(0) + block.row * grad.stride(1), grad.stride(1),
                         grad.stride(0)),
                  matrix(rows, low * rows.stride(0) + block.column * rows.stride(1), rows.stride(0),
                         rows.stride(1)),
                  at(grad_weight, (block.expert * width + block.row) * depth + block.column),
                  depth,
                  nullptr,
                  kind,
                  block.rows,
                  block.columns,
                  bounds[block.expert + 1] - low,
                  width,
                  stream};
    });
  }
  if (need_bias) {
    parallel_tasks(experts, 0, [&](int64_t e, char*) {
      kernels().column_sums(
          matrix(grad, bounds[e] * grad.stride(0), grad.stride(0), grad.stride(1)), nullptr, kind,
          bounds[e + 1] - bounds[e], width, at(grad_bias, e * width));
    });
  }
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace ppmoe::expert_slice
