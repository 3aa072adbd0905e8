// pixel_adaptive_fusion: checks, results, and blocks of rows for the threads.
#include "cpu/ladder_attention/fusion_ops.h"

#include <algorithm>
#include <vector>

#include "cpu/ladder_attention/ops.h"

namespace ppmoe::ladder_attention {
namespace {

constexpr int64_t kLeastRows = 12;                              // of a task, unless there are fewer
constexpr int64_t kGradientRows = 144, kGradientColumns = 384;  // of a block of a weight's gradient

void check_parameter(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                     const char* axes, std::initializer_list<int64_t> sizes) {
  check_dim(op, name, tensor, axes);
  check_dtype(op, name, tensor, {x.scalar_type()}, "as x");
  const char* letter = axes;
  int64_t axis = 0;
  for (int64_t size : sizes) {
    const char text[2] = {*letter, 0};
    check_size(op, name, text, tensor.size(axis++), size, *letter == 'C' ? "as x" : "as w1");
    letter += 3;
  }
}

void check_fusion(const char* op, const Tensor& x, const Tensor& w1, const Tensor& b1,
                  const Tensor& w2, const Tensor& b2, const Tensor& wp) {
  if (x.dim() < 2) bad_value(op, ": x has ", x.dim(), " axes; expected 2 or more: [..., C]");
  check_dtype(op, "x", x, kFloats);
  check_dim(op, "w1", w1, "D, C");
  const int64_t c = x.size(x.dim() - 1), d = w1.size(0);
  check_parameter(op, "w1", w1, x, "D, C", {d, c});
  check_parameter(op, "b1", b1, x, "D", {d});
  check_parameter(op, "w2", w2, x, "C, D", {c, d});
  check_parameter(op, "b2", b2, x, "C", {c});
  check_parameter(op, "wp", wp, x, "C, C", {c, c});
}

std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis != 0 ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return "[" + text + "]";
}

// All axes but the last as one: rows of channels that lie together, at equal distances.
struct RowsOf {
  Tensor tensor;  // kept alive
  int64_t count, stride;
};

RowsOf rows_of(const Tensor& x) {
  const int64_t last = x.dim() - 1, channels = x.size(last);
  int64_t count = 1, stride = 0;
  bool even = channels <= 1 || x.stride(last) == 1;
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (x.size(axis) != 1) {
      if (count == 1) stride = x.stride(axis);
      even = even && x.stride(axis) == stride * count;
    }
    count *= x.size(axis);
  }
  if (even) return {x, count, stride};
  return {torch::stable::contiguous(x), count, channels};
}

Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = elements;
    elements *= std::max<int64_t>(sizes[axis], 1);
  }
  AtenTensorHandle handle = nullptr;
  const int32_t code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()));
  check_shim(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), code,
                                      aoti_torch_device_type_cpu(), 0, &handle),
             "allocation");
  Tensor tensor(handle);
  advise_huge_pages(tensor.mutable_data_ptr(), elements * tensor.element_size());
  return tensor;
}

// The packed parameters of a call.
Bytes pack(const FusionLayer& layer) {
  const FusionKernels& k = kernels().fusion;
  Bytes packed = aligned_bytes(k.fusion_bytes(layer));
  const int64_t elements = layer.channels * (layer.channels + 2 * layer.width);
  // An element takes about as long as eight multiply-adds.
  run_tasks(k.fusion_units(layer), 8 * elements, 0,
            [&](int64_t unit, char*) { k.fusion_pack(layer, unit, packed.get()); });
  return packed;
}

// Runs body(first row, rows, scratch) for blocks of rows.
template <class F>
void by_rows(int64_t rows, int64_t products, int64_t scratch, const F& body) {
  const int64_t each = std::max<int64_t>(rows_of_task(rows), 1);
  run_tasks(ceil_div(rows, each), rows * products, scratch, [&](int64_t task, char* bytes) {
    body(task * each, std::min(each, rows - task * each), bytes);
  });
}

struct RowsAt {
  const char* data;
  int64_t stride;
};

// Blocks of left^T @ right, smaller ones for many threads. No result depends on the cut.
void add_product(std::vector<FusionGradient>& blocks, const RowsAt& left, const RowsAt& right,
                 bool padded, const Tensor& out, int64_t rows) {
  const int64_t m = out.size(0), n = out.size(1), size = out.element_size();
  const int64_t most = std::clamp<int64_t>(2 * kGradientRows / torch::stable::get_num_threads(),
                                           kFusionRows, kGradientRows);
  const int64_t tall = ceil_div(m, std::max<int64_t>(ceil_div(m, most), 1));
  for (int64_t row = 0; row < m; row += tall) {
    for (int64_t column = 0; column < n; column += kGradientColumns) {
      blocks.push_back({kernel_dtype(out.scalar_type()), left.data + row * size,
                        right.data + column * size, left.stride, right.stride, padded, rows,
                        std::min(tall, m - row), std::min(kGradientColumns, n - column),
                        data<char>(out) + (row * n + column) * size, n});
    }
  }
}

}  // namespace

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

int64_t rows_of_task(int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t tasks = ceil_div(rows, kFusionRows);
  const int64_t even = ceil_div(tasks, threads) * threads;
  if (rows >= even * kLeastRows) tasks = even;
  return tasks > 0 ? ceil_div(rows, tasks) : 0;
}

Tensor pixel_adaptive_fusion(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor wp,
                             Tensor bp) {
  const char* op = "pixel_adaptive_fusion";
  check_fusion(op, x, w1, b1, w2, b2, wp);
  const int64_t c = x.size(x.dim() - 1), d = w1.size(0);
  check_parameter(op, "bp", bp, x, "C", {c});
  Tensor out = new_like(x);
  if (out.numel() == 0) return out;
  b1 = closed(b1), b2 = closed(b2), bp = closed(bp);
  const RowsOf rows = rows_of(x);
  const DType dtype = kernel_dtype(x.scalar_type());
  const Bytes packed = pack({dtype, c, d, matrix_of(w1), matrix_of(w2), matrix_of(wp),
                             b1.const_data_ptr(), b2.const_data_ptr(), bp.const_data_ptr(), false});
  Fusion fusion{};
  fusion.dtype = dtype;
  fusion.channels = c;
  fusion.width = d;
  fusion.weights = packed.get();
  fusion.x = rows.tensor.const_data_ptr();
  fusion.x_row = rows.stride;
  fusion.out = out.mutable_data_ptr();
  fusion.out_row = c;
  const FusionKernels& k = kernels().fusion;
  by_rows(
      rows.count, c * (c + 2 * d), k.fusion_scratch(fusion, kFusionRows),
      [&](int64_t row, int64_t count, char* scratch) { k.fusion(fusion, row, count, scratch); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pixel_adaptive_fusion_backward(
    Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor wp) {
  const char* op = "pixel_adaptive_fusion_backward";
  check_fusion(op, x, w1, b1, w2, b2, wp);
  check_dtype(op, "grad", grad, {x.scalar_type()}, "as x");
  if (shape_of(grad) != shape_of(x)) {
    bad_value(op, ": grad has shape ", shape_of(grad), "; expected ", shape_of(x), " (as x)");
  }
  const int64_t c = x.size(x.dim() - 1), d = w1.size(0);
  const ScalarType type = x.scalar_type();
  Tensor grad_x = new_like(x);
  Tensor grad_w1 = new_tensor({d, c}, type), grad_b1 = new_tensor({d}, type);
  Tensor grad_w2 = new_tensor({c, d}, type), grad_b2 = new_tensor({c}, type);
  Tensor grad_wp = new_tensor({c, c}, type), grad_bp = new_tensor({c}, type);
  const auto results = [&] {
    return std::make_tuple(grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_wp, grad_bp);
  };
  if (x.numel() == 0) {
    for (const Tensor& each : {grad_w1, grad_b1, grad_w2, grad_b2, grad_wp, grad_bp}) {
      std::fill_n(data<char>(each), each.numel() * each.element_size(), 0);
    }
    return results();
  }
  b1 = closed(b1), b2 = closed(b2);
  const RowsOf from_x = rows_of(x), from_grad = rows_of(grad);
  const DType dtype = kernel_dtype(type);
  const FusionKernels& k = kernels().fusion;
  const int64_t count = from_x.count, size = x.element_size();
  const int64_t narrow = k.fusion_pitch(dtype, d), wide = k.fusion_pitch(dtype, c);
  const Bytes kept = aligned_bytes(2 * count * (narrow + wide) * size);
  char* const hidden = kept.get();
  char* const grad_hidden = hidden + count * narrow * size;
  char* const gated = grad_hidden + count * narrow * size;
  char* const grad_gate = gated + count * wide * size;
  {
    const Bytes packed = pack({dtype, c, d, matrix_of(w1), matrix_of(w2), matrix_of(wp),
                               b1.const_data_ptr(), b2.const_data_ptr(), nullptr, true});
    FusionBackward fusion{};
    fusion.dtype = dtype;
    fusion.channels = c;
    fusion.width = d;
    fusion.weights = packed.get();
    fusion.x = from_x.tensor.const_data_ptr();
    fusion.x_row = from_x.stride;
    fusion.grad = from_grad.tensor.const_data_ptr();
    fusion.grad_row = from_grad.stride;
    fusion.grad_x = grad_x.mutable_data_ptr();
    fusion.grad_x_row = c;
    fusion.hidden = hidden;
    fusion.grad_hidden = grad_hidden;
    fusion.gated = gated;
    fusion.grad_gate = grad_gate;
    by_rows(count, c * (c + 4 * d), k.fusion_backward_scratch(fusion, kFusionRows),
            [&](int64_t row, int64_t rows, char* scratch) {
              k.fusion_backward(fusion, row, rows, scratch);
            });
  }
  const auto at = [](const RowsOf& rows) {
    return RowsAt{static_cast<const char*>(rows.tensor.const_data_ptr()), rows.stride};
  };
  const RowsAt rows_x = at(from_x), rows_grad = at(from_grad);
  const RowsAt rows_hidden{hidden, narrow}, rows_grad_hidden{grad_hidden, narrow};
  const RowsAt rows_gated{gated, wide}, rows_grad_gate{grad_gate, wide};
  std::vector<FusionGradient> blocks;
  add_product(blocks, rows_grad, rows_gated, true, grad_wp, count);
  add_product(blocks, rows_grad_hidden, rows_x, false, grad_w1, count);
  add_product(blocks, rows_grad_gate, rows_hidden, true, grad_w2, count);
  int64_t scratch_bytes = 0;
  for (const FusionGradient& block : blocks) {
    scratch_bytes = std::max(scratch_bytes, k.fusion_gradient_scratch(block));
  }
  const auto sum = [&](const RowsAt& rows, const Tensor& out) {
    k.fusion_sums(dtype, rows.data, rows.stride, count, out.size(0), data<char>(out));
  };
  const auto products = static_cast<int64_t>(blocks.size());
  run_tasks(products + 3, count * c * (c + 2 * d), scratch_bytes, [&](int64_t task, char* scratch) {
    if (task < products) return k.fusion_gradient(blocks[static_cast<size_t>(task)], scratch);
    if (task == products) return sum(rows_grad, grad_bp);
    if (task == products + 1) return sum(rows_grad_gate, grad_b2);
    sum(rows_grad_hidden, grad_b1);
  });
  return results();
}

}  // namespace ppmoe::ladder_attention
