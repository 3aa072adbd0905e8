// What the CPU operators of ladder attention share: checks in the words of windows.py, maps, small
// parameters in wide elements, packed weights.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/ladder_attention/kernels.h"
#include "ppmoe/capability.h"
#include "ppmoe/op.h"

namespace ppmoe::ladder_attention {

// The kernels of the instruction set in use.
const Kernels& kernels();

using Pair = std::vector<int64_t>;

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                       const char* as_what) {
  check_dim(op, name, tensor, "B, H, W, C");
  const std::string why = concat("as ", as_what);
  check_dtype(op, name, tensor, {first.scalar_type()}, why.c_str());
  static const char* const kAxes[] = {"B", "H", "W", "C"};
  for (int axis = 0; axis < 4; ++axis) {
    check_size(op, name, kAxes[axis], tensor.size(axis), first.size(axis), why.c_str());
  }
}

inline void check_wide(const char* op, const char* name, const Tensor& tensor,
                       const Tensor& first) {
  const ScalarType own = first.scalar_type(), wide = wide_dtype(own);
  const char* why = "that of the map, or what it is summed in";
  if (own == wide) return check_dtype(op, name, tensor, {own}, why);
  check_dtype(op, name, tensor, {own, wide}, why);
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, const char* axis,
                         int64_t size, const char* why, const Tensor& first, bool wide) {
  check_dim(op, name, tensor, axis);
  if (wide) {
    check_wide(op, name, tensor, first);
  } else {
    check_dtype(op, name, tensor, {first.scalar_type()}, "as x");
  }
  check_size(op, name, axis, tensor.size(0), size, why);
}

// `axes` are two letters.
inline void check_matrix(const char* op, const char* name, const Tensor& tensor,
                         const char* first_axis, const char* second_axis, int64_t first_size,
                         int64_t second_size, const char* why, const Tensor& first) {
  check_dim(op, name, tensor, concat(first_axis, ", ", second_axis).c_str());
  check_dtype(op, name, tensor, {first.scalar_type()}, "as x");
  check_size(op, name, first_axis, tensor.size(0), first_size, why);
  check_size(op, name, second_axis, tensor.size(1), second_size, why);
}

inline void check_windows(const char* op, int64_t channels, int64_t heads, const Pair& window,
                          const Pair& shift) {
  if (channels < 1) bad_value(op, ": C is ", channels, "; allowed: at least 1");
  if (heads < 1 || channels % heads != 0) {
    bad_value(op, ": num_heads is ", heads, "; allowed: divisors of C = ", channels);
  }
  for (const auto& [name, pair] : {std::pair{"window", &window}, std::pair{"shift", &shift}}) {
    if (pair->size() != 2) {
      bad_value(op, ": ", name, " has ", pair->size(), " numbers; expected 2: [rows, columns]");
    }
  }
  static const char* const kAxes[] = {"rows", "columns"};
  for (size_t i = 0; i < 2; ++i) {
    check_between(op, concat("window (", kAxes[i], ")").c_str(), window[i], 1, INT16_MAX);
  }
  for (size_t i = 0; i < 2; ++i) {
    check_between(op, concat("shift (", kAxes[i], ")").c_str(), shift[i], 1 - window[i],
                  window[i] - 1, "smaller than the window");
  }
}

inline void check_bias_table(const char* op, const Tensor& table, const Tensor& first,
                             int64_t heads, const Pair& window) {
  check_dim(op, "bias_table", table, "R, heads");
  check_wide(op, "bias_table", table, first);
  check_size(op, "bias_table", "R", table.size(0), (2 * window[0] - 1) * (2 * window[1] - 1),
             "(2 * window rows - 1) * (2 * window columns - 1)");
  check_size(op, "bias_table", "heads", table.size(1), heads, "num_heads");
}

// `channel` channels from the first one on.
inline Map map_of(const Tensor& tensor, int64_t channel = 0) {
  char* const first =
      data<char>(tensor) + channel * tensor.stride(3) * static_cast<int64_t>(tensor.element_size());
  return {first, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline int64_t wide_bytes(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : 4; }

// A small parameter in wide elements, with zeros behind it that whole vectors may read.
inline Bytes wide_vector(const Tensor& tensor, ScalarType first) {
  constexpr int64_t kSlack = 64;
  const int64_t n = tensor.numel(), size = wide_bytes(first);
  Bytes bytes = aligned_bytes((n + kSlack) * size);
  kernels().attention.widen(kernel_dtype(tensor.scalar_type()), tensor.const_data_ptr(),
                            tensor.dim() > 0 && n > 0 ? tensor.stride(0) : 1, n, bytes.get());
  std::fill_n(bytes.get() + n * size, kSlack * size, 0);
  return bytes;
}

// Rows of packed elements between two phases; whole vectors may be read past the last one.
struct Rows {
  DType dtype;
  int64_t stride, element;
  Bytes bytes;

  Rows(DType storage, int64_t rows, int64_t columns)
      : dtype(kernels().attention.packed_dtype(storage)),
        stride(kernels().attention.packed_stride(storage, columns)),
        element(dtype == DType::kF64   ? 8
                : dtype == DType::kF32 ? 4
                                       : 2),
        bytes(aligned_bytes((rows * stride + 64) * element)) {
    // The odd element behind a row takes part in products, with a weight of zero.
    if (stride != columns) std::fill_n(bytes.get(), rows * stride * element, 0);
  }
  char* data() const { return bytes.get(); }
  Map map(int64_t channel, int64_t height, int64_t width) const {
    return {bytes.get() + channel * element, height * width * stride, width * stride, stride, 1};
  }
};

// Weights to be packed: `outputs` outputs of `depth` inputs, at any strides.
struct Packing {
  const Tensor* weight;
  bool turned;  // [depth, outputs]
  Bytes bytes;

  explicit Packing(const Tensor& from, bool turn = false)
      : weight(&from),
        turned(turn),
        bytes(aligned_bytes(kernels().attention.weight_bytes(kernel_dtype(from.scalar_type()),
                                                             outputs(), depth()))) {}
  int64_t outputs() const { return weight->size(turned ? 1 : 0); }
  int64_t depth() const { return weight->size(turned ? 0 : 1); }
  int64_t panels() const {
    return kernels().attention.weight_panels(kernel_dtype(weight->scalar_type()), outputs());
  }
  void pack(int64_t panel) const {
    kernels().attention.pack_weights(kernel_dtype(weight->scalar_type()), weight->const_data_ptr(),
                                     weight->stride(turned ? 1 : 0), weight->stride(turned ? 0 : 1),
                                     outputs(), depth(), panel, panel + 1, bytes.get());
  }
};

// Packs all of them, panel by panel.
inline void pack_all(std::initializer_list<const Packing*> packings) {
  int64_t panels = 0, elements = 0;
  for (const Packing* each : packings) {
    panels += each->panels();
    elements += each->outputs() * each->depth();
  }
  // An element takes about as long as eight multiply-adds.
  run_tasks(panels, 8 * elements, 0, [&](int64_t task, char*) {
    for (const Packing* each : packings) {
      if (task < each->panels()) return each->pack(task);
      task -= each->panels();
    }
  });
}

// Runs body(first, past, scratch) over blocks of kRowBlock rows, `products` multiply-adds in all.
template <class F>
void run_rows(int64_t rows, int64_t products, int64_t scratch_bytes, const F& body) {
  run_tasks(ceil_div(rows, kRowBlock), products, scratch_bytes, [&](int64_t task, char* scratch) {
    const int64_t tasks = ceil_div(rows, kRowBlock);
    body(rows * task / tasks, rows * (task + 1) / tasks, scratch);
  });
}

}  // namespace ppmoe::ladder_attention
