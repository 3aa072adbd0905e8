// window_attention: checks, and a cut of the windows into tasks for the threads.
#include "cpu/ladder_attention/attention_ops.h"

#include <algorithm>
#include <cmath>

namespace ppmoe::ladder_attention {
namespace {

// Windows of one size share their bias within a task, so tasks are as large as keep the threads
// busy, up to so many multiply-adds a head.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskProducts = 1 << 21;
// Into how many sums, at most, a bias table's gradient is parted; sizes alone decide.
constexpr int64_t kTableParts = 32;

void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& bias_table, int64_t heads, const Pair& window,
                     const Pair& shift) {
  check_dim(op, "q", q, "B, H, W, C");
  check_dtype(op, "q", q, kFloats);
  check_like(op, "k", k, q, "q");
  check_like(op, "v", v, q, "q");
  check_windows(op, q.size(3), heads, window, shift);
  if (bias_table.has_value()) check_bias_table(op, *bias_table, q, heads, window);
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const void* bias,
                       int64_t heads, const Pair& window, const Pair& shift,
                       std::optional<double> scale) {
  const int64_t head_dim = q.size(3) / heads;
  return {map_of(q),
          map_of(k),
          map_of(v),
          {},
          kernel_dtype(q.scalar_type()),
          bias,
          heads,
          head_dim,
          scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(head_dim)),
          Cut::of(q.size(1), window[0], shift[0]),
          Cut::of(q.size(2), window[1], shift[1])};
}

int64_t unit_products(const Attention& a) {
  const int64_t tokens = a.rows.longest() * a.columns.longest();
  return std::max<int64_t>(2 * tokens * tokens * a.head_dim, 1);
}

int64_t table_rows(const Attention& a) {
  return (2 * a.rows.window - 1) * (2 * a.columns.window - 1);
}

}  // namespace

Bytes turned_table(const Tensor& table, ScalarType first) {
  const int64_t rows = table.size(0), heads = table.size(1), size = wide_bytes(first);
  Bytes bytes = aligned_bytes((heads * rows + kBiasSlack) * size);
  const char* const from = static_cast<const char*>(table.const_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    kernels().attention.widen(kernel_dtype(table.scalar_type()),
                              from + head * table.stride(1) * table.element_size(), table.stride(0),
                              rows, bytes.get() + head * rows * size);
  }
  std::fill_n(bytes.get() + heads * rows * size, kBiasSlack * size, 0);
  return bytes;
}

void run_attention(const Attention& a, int64_t images) {
  const int64_t windows = images * a.windows(), products = unit_products(a);
  // Some windows with all their heads, or where there are few windows some heads of one.
  const int64_t enough = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t each =
      std::clamp<int64_t>(windows / enough, 1, std::max<int64_t>(kTaskProducts / products, 1));
  const int64_t parts = std::min(a.heads, ceil_div(enough, windows));
  const int64_t cuts = ceil_div(windows, each);
  run_tasks(cuts * parts, windows * a.heads * products, kernels().attention.attention_scratch(a),
            [&](int64_t task, char* scratch) {
              const int64_t cut = task / parts, part = task % parts;
              const int64_t first = a.heads * part / parts;
              kernels().attention.attention(a, windows * cut / cuts, windows * (cut + 1) / cuts,
                                            first, a.heads * (part + 1) / parts - first, scratch);
            });
}

void run_attention_backward(const AttentionBackward& b, int64_t images, const Tensor* table) {
  const Attention& a = b.forward;
  const int64_t windows = images * a.windows(), products = unit_products(a);
  const int64_t parts = std::min(windows, kTableParts);
  const int64_t rows = table_rows(a), size = a.dtype == DType::kF64 ? 8 : 4;
  // Slack between the tables, as a thread's vectors reach past the end of its own.
  const int64_t apart = rows + kBiasSlack;
  Bytes tables = aligned_bytes(table != nullptr ? parts * a.heads * apart * size : 0);
  const int64_t scratch_bytes = kernels().attention.attention_backward_scratch(b);
  run_tasks(parts * a.heads, 3 * windows * a.heads * products, scratch_bytes,
            [&](int64_t task, char* scratch) {
              const int64_t part = task / a.heads, head = task % a.heads;
              char* own = nullptr;
              if (table != nullptr) {
                own = tables.get() + (head * parts + part) * apart * size;
                std::fill_n(own, apart * size, 0);
              }
              kernels().attention.attention_backward(b, head, windows * part / parts,
                                                     windows * (part + 1) / parts, own, scratch);
            });
  if (table == nullptr) return;
  const auto sum = [&](auto zero) {
    using W = decltype(zero);
    const W* from = reinterpret_cast<const W*>(tables.get());
    std::vector<W> totals(static_cast<size_t>(rows * a.heads));
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t part = 0; part < parts; ++part, from += apart) {
        for (int64_t row = 0; row < rows; ++row) {
          totals[static_cast<size_t>(row * a.heads + head)] += from[row];
        }
      }
    }
    kernels().attention.narrow(kernel_dtype(table->scalar_type()), totals.data(), rows * a.heads,
                               table->mutable_data_ptr());
  };
  a.dtype == DType::kF64 ? sum(double{}) : sum(float{});
}

Tensor window_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias_table,
                        int64_t num_heads, Pair window, Pair shift, std::optional<double> scale) {
  check_attention("window_attention", q, k, v, bias_table, num_heads, window, shift);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  if (out.numel() == 0) return out;
  Bytes bias{nullptr, &std::free};
  if (bias_table.has_value()) bias = turned_table(*bias_table, q.scalar_type());
  Attention a = attention_of(q, k, v, bias.get(), num_heads, window, shift, scale);
  a.out = map_of(out);
  run_attention(a, q.size(0));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias_table, int64_t num_heads,
    Pair window, Pair shift, std::optional<double> scale, bool need_bias) {
  const char* op = "window_attention_backward";
  check_attention(op, q, k, v, bias_table, num_heads, window, shift);
  check_like(op, "grad", grad, q, "q");
  const auto like = [&](const Tensor& t) {
    return new_tensor({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  };
  Tensor grad_q = like(q), grad_k = like(q), grad_v = like(q);
  const ScalarType kept = bias_table.has_value() ? bias_table->scalar_type() : q.scalar_type();
  const bool wanted = bias_table.has_value() && need_bias;
  Tensor grad_bias =
      wanted ? new_tensor({bias_table->size(0), bias_table->size(1)}, kept) : new_tensor({0}, kept);
  if (grad_q.numel() == 0) {
    std::fill_n(data<char>(grad_bias), grad_bias.numel() * grad_bias.element_size(), 0);
    return {grad_q, grad_k, grad_v, grad_bias};
  }
  Bytes bias{nullptr, &std::free};
  if (bias_table.has_value()) bias = turned_table(*bias_table, q.scalar_type());
  const AttentionBackward backward{
      attention_of(q, k, v, bias.get(), num_heads, window, shift, scale), map_of(grad),
      map_of(grad_q), map_of(grad_k), map_of(grad_v)};
  run_attention_backward(backward, q.size(0), wanted ? &grad_bias : nullptr);
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace ppmoe::ladder_attention
