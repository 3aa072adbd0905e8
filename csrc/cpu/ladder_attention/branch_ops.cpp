// ladder_attention: checks, and the phases of a branch over the threads.
#include <algorithm>
#include <cmath>

#include "cpu/ladder_attention/attention_ops.h"

namespace ppmoe::ladder_attention {
namespace {

void check_branch(const char* op, const Tensor& x, const std::optional<Tensor>& v,
                  const Tensor& ln_w, const Tensor& ln_b, const Tensor& w_in, const Tensor& b_in,
                  const Tensor& bias_table, const Tensor& w_out,
                  const std::optional<Tensor>& row_scale, int64_t heads, const Pair& window,
                  const Pair& shift) {
  check_dim(op, "x", x, "B, H, W, g");
  check_dtype(op, "x", x, kFloats);
  const int64_t width = x.size(3);
  if (v.has_value()) check_like(op, "v", *v, x, "x");
  check_vector(op, "ln_w", ln_w, "g", width, "as x", x, true);
  check_vector(op, "ln_b", ln_b, "g", width, "as x", x, true);
  const int64_t outputs = (v.has_value() ? 2 : 3) * width;
  const char* why = v.has_value() ? "2g with v" : "3g without v";
  check_matrix(op, "w_in", w_in, "O", "g", outputs, width, concat(why, "; g as x").c_str(), x);
  check_vector(op, "b_in", b_in, "O", outputs, why, x, false);
  check_windows(op, width, heads, window, shift);
  check_bias_table(op, bias_table, x, heads, window);
  check_matrix(op, "w_out", w_out, "O", "g", width, width, "g of x", x);
  if (row_scale.has_value()) {
    check_vector(op, "row_scale", *row_scale, "B", x.size(0), "as x", x, true);
  }
}

Tensor map_like(const Tensor& x) {
  return new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

// The parameters of a branch as the kernels take them, and what its two products share.
struct Branch {
  int64_t images, height, width, channels, tokens;
  ScalarType scalar;
  DType dtype;
  bool later;  // v comes from outside
  Bytes ln_w, ln_b, b_in, table, row_scale{nullptr, &std::free};
  Packing w_in, w_out;
  Rows projected, normed, v_rows;
  bool converted;  // v is copied to packed elements

  Branch(const Tensor& x, const std::optional<Tensor>& v, const Tensor& norm_w,
         const Tensor& norm_b, const Tensor& in, const Tensor& in_bias, const Tensor& bias_table,
         const Tensor& out, const std::optional<Tensor>& scale, bool keep_normed, bool turn_out)
      : images(x.size(0)),
        height(x.size(1)),
        width(x.size(2)),
        channels(x.size(3)),
        tokens(images * height * width),
        scalar(x.scalar_type()),
        dtype(kernel_dtype(scalar)),
        later(v.has_value()),
        ln_w(wide_vector(norm_w, scalar)),
        ln_b(wide_vector(norm_b, scalar)),
        b_in(wide_vector(in_bias, scalar)),
        table(turned_table(bias_table, scalar)),
        w_in(in),
        w_out(out, turn_out),
        projected(dtype, tokens, in.size(0)),
        normed(dtype, keep_normed ? tokens : 0, channels),
        v_rows(dtype, 0, 0),
        converted(later && projected.dtype != dtype) {
    if (scale.has_value()) row_scale = wide_vector(*scale, scalar);
    if (converted) v_rows = Rows(dtype, tokens, channels);
  }

  BranchIn in(const Tensor& x, const std::optional<Tensor>& v, double eps) const {
    BranchIn b{};
    b.x = map_of(x);
    b.height = height;
    b.width = width;
    b.channels = channels;
    b.outputs = w_in.outputs();
    b.dtype = dtype;
    b.ln_w = ln_w.get();
    b.ln_b = ln_b.get();
    b.weights = w_in.bytes.get();
    b.bias = b_in.get();
    b.eps = eps;
    b.normed = normed.bytes.get();
    b.out = projected.data();
    b.row_scale = row_scale.get();
    if (converted) {
      b.v = map_of(*v);
      b.v_rows = v_rows.data();
    }
    return b;
  }

  // Of what `in` has left, in packed elements.
  Attention attention(const std::optional<Tensor>& v, int64_t heads, const Pair& window,
                      const Pair& shift) const {
    Attention a{};
    a.q = projected.map(0, height, width);
    a.k = projected.map(channels, height, width);
    if (!later) {
      a.v = projected.map(2 * channels, height, width);
    } else {
      a.v = converted ? v_rows.map(0, height, width) : map_of(*v);
    }
    a.dtype = projected.dtype;
    a.bias = table.get();
    a.heads = heads;
    a.head_dim = channels / heads;
    a.scale = 1 / std::sqrt(static_cast<double>(a.head_dim));
    a.rows = Cut::of(height, window[0], shift[0]);
    a.columns = Cut::of(width, window[1], shift[1]);
    return a;
  }
};

// `sums` [parts, 2, stride] added up in order; both vectors to the dtypes of their parameters.
template <class W>
void add_norm_sums(const char* sums, int64_t parts, int64_t stride, int64_t channels,
                   const Tensor& grad_w, const Tensor& grad_b) {
  std::vector<W> totals(static_cast<size_t>(2 * stride));
  const W* from = reinterpret_cast<const W*>(sums);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < 2 * stride; ++i) totals[static_cast<size_t>(i)] += *from++;
  }
  kernels().attention.narrow(kernel_dtype(grad_w.scalar_type()), totals.data(), channels,
                             grad_w.mutable_data_ptr());
  kernels().attention.narrow(kernel_dtype(grad_b.scalar_type()), totals.data() + stride, channels,
                             grad_b.mutable_data_ptr());
}

void clear(const Tensor& tensor) {
  std::fill_n(data<char>(tensor), tensor.numel() * tensor.element_size(), 0);
}

// The gradients of both weights and both biases, in one go over the threads.
void weight_gradients(const Rows& grad_in, const Rows& normed, const Rows& scaled,
                      const Rows& attended, int64_t tokens, const Tensor& w_in, const Tensor& b_in,
                      const Tensor& w_out, const Tensor& b_out) {
  const DType dtype = kernel_dtype(w_in.scalar_type());
  const int64_t channels = w_in.size(1), inputs = w_in.size(0);
  const WeightGradient in{grad_in.data(), normed.data(),          tokens, inputs, channels,
                          dtype,          w_in.mutable_data_ptr()};
  const WeightGradient out{scaled.data(), attended.data(),         tokens, channels, channels,
                           dtype,         w_out.mutable_data_ptr()};
  const int64_t in_tasks = ceil_div(inputs, kRowBlock), out_tasks = ceil_div(channels, kRowBlock);
  const int64_t bytes = std::max(kernels().attention.weight_gradient_scratch(in),
                                 kernels().attention.weight_gradient_scratch(out));
  const auto sum = [&](const Rows& rows, const Tensor& to) {
    const int64_t n = to.size(0);
    Bytes sums = aligned_bytes(n * rows.element);
    kernels().column_sums({rows.data(), rows.stride, 1}, nullptr, rows.dtype, tokens, n,
                          sums.get());
    if (rows.dtype == dtype) {
      std::copy_n(sums.get(), n * rows.element, data<char>(to));
    } else {
      kernels().attention.narrow(dtype, sums.get(), n, to.mutable_data_ptr());
    }
  };
  run_tasks(in_tasks + out_tasks + 2, tokens * channels * (inputs + channels), bytes,
            [&](int64_t task, char* scratch) {
              if (task == 0) return sum(grad_in, b_in);
              if (task == 1) return sum(scaled, b_out);
              task -= 2;
              const bool first = task < in_tasks;
              const WeightGradient& gradient = first ? in : out;
              const int64_t begin = (first ? task : task - in_tasks) * kRowBlock;
              kernels().attention.weight_gradient(
                  gradient, begin, std::min(gradient.outputs, begin + kRowBlock), scratch);
            });
}

}  // namespace

Tensor ladder_attention(Tensor x, std::optional<Tensor> v, Tensor ln_w, Tensor ln_b, Tensor w_in,
                        Tensor b_in, Tensor bias_table, Tensor w_out, Tensor b_out,
                        std::optional<Tensor> row_scale, int64_t num_heads, Pair window, Pair shift,
                        double eps) {
  const char* op = "ladder_attention";
  check_branch(op, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window,
               shift);
  check_vector(op, "b_out", b_out, "g", x.size(3), "as x", x, false);
  Tensor z = map_like(x);
  if (z.numel() == 0) return z;
  const Branch branch(x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, v.has_value(),
                      false);
  const Bytes bias = wide_vector(b_out, branch.scalar);
  const Rows attended(branch.dtype, branch.tokens, branch.channels);
  pack_all({&branch.w_in, &branch.w_out});

  BranchIn in = branch.in(x, v, eps);
  if (!branch.later) in.normed = nullptr;
  const int64_t square = branch.tokens * branch.channels * branch.channels;
  run_rows(branch.tokens, square * (branch.later ? 2 : 3),
           kernels().attention.branch_in_scratch(in),
           [&](int64_t begin, int64_t end, char* scratch) {
             kernels().attention.branch_in(in, begin, end, scratch);
           });
  Attention attention = branch.attention(v, num_heads, window, shift);
  attention.out = attended.map(0, branch.height, branch.width);
  run_attention(attention, branch.images);
  const BranchOut out{map_of(x),
                      map_of(z),
                      branch.height,
                      branch.width,
                      branch.channels,
                      branch.dtype,
                      attended.data(),
                      branch.later ? branch.normed.data() : nullptr,
                      branch.w_out.bytes.get(),
                      bias.get(),
                      branch.row_scale.get()};
  run_rows(branch.tokens, square, kernels().attention.branch_out_scratch(out),
           [&](int64_t begin, int64_t end, char* scratch) {
             kernels().attention.branch_out(out, begin, end, scratch);
           });
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ladder_attention_backward(Tensor grad, Tensor x, std::optional<Tensor> v, Tensor ln_w, Tensor ln_b,
                          Tensor w_in, Tensor b_in, Tensor bias_table, Tensor w_out,
                          std::optional<Tensor> row_scale, int64_t num_heads, Pair window,
                          Pair shift, double eps, bool need_maps, bool need_parameters) {
  const char* op = "ladder_attention_backward";
  check_branch(op, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window,
               shift);
  check_like(op, "grad", grad, x, "x");
  const auto vector = [&](const Tensor& like, int64_t n) {
    return new_tensor({need_parameters ? n : 0}, like.scalar_type());
  };
  const auto matrix = [&](const Tensor& like) {
    if (!need_parameters) return new_tensor({0}, like.scalar_type());
    return new_tensor({like.size(0), like.size(1)}, like.scalar_type());
  };
  const ScalarType dtype = x.scalar_type();
  Tensor grad_x = need_maps ? map_like(x) : new_tensor({0}, dtype);
  Tensor grad_v = need_maps && v.has_value() ? map_like(x) : new_tensor({0}, dtype);
  Tensor grad_ln_w = vector(ln_w, x.size(3)), grad_ln_b = vector(ln_b, x.size(3));
  Tensor grad_w_in = matrix(w_in), grad_b_in = vector(b_in, b_in.size(0));
  Tensor grad_table = matrix(bias_table), grad_w_out = matrix(w_out);
  Tensor grad_b_out = vector(x, x.size(3));
  const auto results = [&] {
    return std::tuple{grad_x,    grad_v,     grad_ln_w,  grad_ln_b, grad_w_in,
                      grad_b_in, grad_table, grad_w_out, grad_b_out};
  };
  if (x.numel() == 0) {
    for (const Tensor& each :
         {grad_ln_w, grad_ln_b, grad_w_in, grad_b_in, grad_table, grad_w_out, grad_b_out}) {
      clear(each);
    }
    return results();
  }
  const Branch branch(x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, true, true);
  const int64_t tokens = branch.tokens, channels = branch.channels, inputs = w_in.size(0);
  const Packing turned_in(w_in, true);
  pack_all({&branch.w_in, &branch.w_out, &turned_in});
  const Rows scaled(branch.dtype, tokens, channels), grad_attended(branch.dtype, tokens, channels);
  const Rows grad_in(branch.dtype, tokens, inputs);
  const Rows attended(branch.dtype, need_parameters ? tokens : 0, channels);
  Rows grad_value(branch.dtype, branch.later ? tokens : 0, channels);

  BranchIn in = branch.in(x, v, eps);
  in.grad = map_of(grad);
  in.out_weights = branch.w_out.bytes.get();
  in.scaled = scaled.data();
  in.grad_attention = grad_attended.data();
  run_rows(tokens, tokens * channels * (inputs + channels),
           kernels().attention.branch_in_scratch(in),
           [&](int64_t begin, int64_t end, char* scratch) {
             kernels().attention.branch_in(in, begin, end, scratch);
           });

  AttentionBackward backward{};
  backward.forward = branch.attention(v, num_heads, window, shift);
  const int64_t height = branch.height, width = branch.width;
  if (need_parameters) backward.forward.out = attended.map(0, height, width);
  backward.grad = grad_attended.map(0, height, width);
  backward.grad_q = grad_in.map(0, height, width);
  backward.grad_k = grad_in.map(channels, height, width);
  const bool direct = branch.later && need_maps && grad_in.dtype == branch.dtype;
  if (!branch.later) {
    backward.grad_v = grad_in.map(2 * channels, height, width);
  } else {
    backward.grad_v = direct ? map_of(grad_v) : grad_value.map(0, height, width);
  }
  run_attention_backward(backward, branch.images, need_parameters ? &grad_table : nullptr);
  if (branch.later && need_maps && !direct) {
    kernels().attention.narrow(branch.dtype, grad_value.data(), tokens * channels,
                               grad_v.mutable_data_ptr());
  }

  const int64_t parts = ceil_div(tokens, kRowBlock);
  const int64_t sums_stride = ceil_div(channels, 64) * 64;
  const int64_t sums_bytes = 2 * sums_stride * wide_bytes(dtype);
  const Bytes sums = aligned_bytes(need_parameters ? parts * sums_bytes : 0);
  const BranchInBackward in_backward{map_of(x),
                                     map_of(grad),
                                     need_maps ? map_of(grad_x) : Map{},
                                     height,
                                     width,
                                     channels,
                                     inputs,
                                     branch.dtype,
                                     branch.ln_w.get(),
                                     eps,
                                     grad_in.data(),
                                     branch.later ? scaled.data() : nullptr,
                                     turned_in.bytes.get(),
                                     nullptr,
                                     sums_stride};
  // Rows are parted by sizes alone, as each part has its own sums.
  run_tasks(parts, tokens * channels * inputs,
            kernels().attention.branch_in_backward_scratch(in_backward),
            [&](int64_t part, char* scratch) {
              BranchInBackward own = in_backward;
              if (need_parameters) {
                own.sums = sums.get() + part * sums_bytes;
                std::fill_n(sums.get() + part * sums_bytes, sums_bytes, 0);
              }
              kernels().attention.branch_in_backward(own, tokens * part / parts,
                                                     tokens * (part + 1) / parts, scratch);
            });
  if (!need_parameters) return results();
  if (dtype == ScalarType::Double) {
    add_norm_sums<double>(sums.get(), parts, sums_stride, channels, grad_ln_w, grad_ln_b);
  } else {
    add_norm_sums<float>(sums.get(), parts, sums_stride, channels, grad_ln_w, grad_ln_b);
  }
  weight_gradients(grad_in, branch.normed, scaled, attended, tokens, grad_w_in, grad_b_in,
                   grad_w_out, grad_b_out);
  return results();
}

}  // namespace ppmoe::ladder_attention
