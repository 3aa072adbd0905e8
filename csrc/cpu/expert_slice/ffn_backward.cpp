// Backward of expert_ffn up to the pre-activation; the weights' gradients are products of gemm.cpp,
// and the gradient of x is one of ffn_out.
#include "cpu/expert_slice/declare.h"
#include "ppmoe/activation.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

// One row of a slab. `grad` is the gradient of the activation before the routing weight.
template <class T>
struct Row {
  const wide_t<T>* grad;
  const T *gate, *up;  // saved pre-activation
  T *grad_gate, *grad_up;
  T* activated;  // times the weight, or null
  wide_t<T> weight;
};

// Returns <activation, its gradient>, which is the part of the routing weight's own gradient.
template <class T, Activation kActivation, bool kGated>
wide_t<T> backward_row(const Row<T>& r, int64_t columns) {
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  V dots{};
  const auto step = [&](V grad, V gate, V up, T* grad_gate, T* grad_up, T* activated)
                        __attribute__((always_inline)) {
                          V slope;
                          const V value = activate<kActivation>(gate, slope);
                          const V whole = kGated ? value * up : value;
                          dots += grad * whole;
                          grad *= r.weight;
                          store_wide(grad_gate, kGated ? grad * up * slope : grad * slope);
                          if constexpr (kGated) store_wide(grad_up, grad * value);
                          if (activated != nullptr) store_wide(activated, whole * r.weight);
                        };
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) {
    step(load<V>(r.grad + j), load_wide(r.gate + j), kGated ? load_wide(r.up + j) : V{},
         r.grad_gate + j, r.grad_up + j, r.activated != nullptr ? r.activated + j : nullptr);
  }
  if (j < columns) {
    // The rest goes through buffers, so that it is computed as all else is.
    T gate[lanes] = {}, up[lanes] = {}, grad_gate[lanes], grad_up[lanes], activated[lanes];
    V grad{};
    for (int64_t i = 0; i < columns - j; ++i) {
      gate[i] = r.gate[j + i];
      if (kGated) up[i] = r.up[j + i];
      grad[i] = r.grad[j + i];
    }
    step(grad, load_wide(gate), load_wide(up), grad_gate, grad_up, activated);
    for (int64_t i = 0; i < columns - j; ++i) {
      r.grad_gate[j + i] = grad_gate[i];
      if (kGated) r.grad_up[j + i] = grad_up[i];
      if (r.activated != nullptr) r.activated[j + i] = activated[i];
    }
  }
  return sum(dots);
}

template <class T, Activation kActivation>
PPMOE_INLINE wide_t<T> backward_row(bool gated, const Row<T>& row, int64_t columns) {
  return gated ? backward_row<T, kActivation, true>(row, columns)
               : backward_row<T, kActivation, false>(row, columns);
}

template <class T>
wide_t<T> backward_row(Activation activation, bool gated, const Row<T>& row, int64_t columns) {
  switch (activation) {
    case Activation::kGelu: return backward_row<T, Activation::kGelu>(gated, row, columns);
    case Activation::kGeluTanh: return backward_row<T, Activation::kGeluTanh>(gated, row, columns);
    case Activation::kRelu: return backward_row<T, Activation::kRelu>(gated, row, columns);
    default: break;  // kSilu, the last one that experts have
  }
  return backward_row<T, Activation::kSilu>(gated, row, columns);
}

template <class T>
struct InBackward {
  const FfnInBackward& f;
  const FfnBlock& block;
  int64_t halves = f.gated ? 2 : 1;
  Lines<T> grad{static_cast<const T*>(f.grad), {f.grad_stride, f.tokens + block.row}, {1}};
  Lines<T> w{static_cast<const T*>(f.w_out.data) + block.expert * f.w_out.expert,
             {f.w_out.col},
             {f.w_out.row}};
  bool thin = is_thin(block.group, grad.depth, w.depth);
  int64_t tile_bytes = Tile<T>::bytes(block.rows, kSlabColumns, 1);
  int64_t slab = thin ? 0 : round_up(slab_bytes<T>(kSlabColumns, 1, f.hidden), 64);

  int64_t scratch() const {
    return tile_bytes + slab + (thin ? 0 : Panels<T>::bytes(block.rows, f.hidden));
  }

  void store(const Tile<T>& tile, int64_t first, int64_t columns) const {
    const int64_t width = f.width, inner = halves * width;
    const T* const pre = static_cast<const T*>(f.pre) + block.row * inner + first;
    T* const out = static_cast<T*>(f.grad_pre) + block.row * inner + first;
    T* const activated =
        f.activated == nullptr ? nullptr : static_cast<T*>(f.activated) + block.row * width + first;
    for (int64_t i = 0; i < block.rows; ++i) {
      const Row<T> row{tile.row(i),
                       pre + i * inner,
                       pre + i * inner + width,
                       out + i * inner,
                       out + i * inner + width,
                       activated == nullptr ? nullptr : activated + i * width,
                       static_cast<const wide_t<T>*>(f.weights)[block.row + i]};
      const wide_t<T> dot = backward_row<T>(f.activation, f.gated, row, columns);
      if (f.dots != nullptr) {
        static_cast<wide_t<T>*>(f.dots)[(block.row + i) * f.dot_slabs + first / kSlabColumns] = dot;
      }
    }
    if (f.panels == nullptr) return;
    const int64_t part_bytes = Panels<T>::bytes(block.rows, width);
    for (int64_t half = 0; half < halves; ++half) {
      const Panels<T> panels(f.panels + block.panels + half * part_bytes, block.rows, width);
      const Lines<T> lines{out + half * width, {inner}, {1}};
      for (int64_t row = 0; row < block.rows;) {
        const int64_t wide = panel_rows(block.rows - row);
        panels.pack(row, wide, lines.from(row, 0), least(wide, block.rows - row), first, columns);
        row += wide;
      }
    }
  }

  void run(int64_t column, int64_t columns, char* scratch) const {
    const Panels<T> panels(scratch + tile_bytes + slab, block.rows, f.hidden);
    for (int64_t row = 0; row < block.rows && !thin;) {
      const int64_t wide = panel_rows(block.rows - row);
      panels.pack(row, wide, grad.from(row, 0), least(wide, block.rows - row), 0, f.hidden);
      row += wide;
    }
    const auto slab_at = [&](int64_t first) {
      return Slab<T>{w.from(first, 0), least(kSlabColumns, column + columns - first), 1, 0};
    };
    for (int64_t first = column; first < column + columns; first += kSlabColumns) {
      const Slab<T> here = slab_at(first);
      const Tile<T> tile(scratch, here.columns, 1);
      const Slab<T> next = slab_at(first + kSlabColumns);
      if (thin) {
        multiply_thin(grad, block.rows, f.hidden, here, tile, next.columns > 0 ? &next : nullptr);
      } else {
        multiply_slab(panels, block.rows, block.group, here, false, scratch + tile_bytes, tile,
                      &next);
      }
      store(tile, first, here.columns);
    }
  }
};

template <class T>
void weights_backward(const FfnWeightsBackward& f, const FfnBlock& block) {
  using W = wide_t<T>;
  const T* bias =
      f.bias == nullptr ? nullptr : static_cast<const T*>(f.bias) + block.expert * f.hidden;
  constexpr int lanes = kWideLanes<T>;
  for (int64_t row = block.row; row < block.row + block.rows; ++row) {
    W total{};
    for (int64_t i = 0; i < f.dot_slabs; ++i) {
      total += static_cast<const W*>(f.dots)[row * f.dot_slabs + i];
    }
    if (bias != nullptr) {
      const T* grad = static_cast<const T*>(f.grad) + f.tokens[row] * f.grad_stride;
      WideVec<T> lots{};
      int64_t j = 0;
      for (; j + lanes <= f.hidden; j += lanes) lots += load_wide(grad + j) * load_wide(bias + j);
      W rest = sum(lots);
      for (; j < f.hidden; ++j) rest += W(to_float(grad[j])) * W(to_float(bias[j]));
      total += rest;
    }
    static_cast<W*>(f.out)[f.slots[row]] = total;
  }
}

}  // namespace

int64_t ffn_in_backward_scratch(const FfnInBackward& f, const FfnBlock& block) {
  return with_type(f.dtype,
                   [&](auto tag) { return InBackward<decltype(untag(tag))>{f, block}.scratch(); });
}

void ffn_in_backward(const FfnInBackward& f, const FfnBlock& block, int64_t column, int64_t columns,
                     void* scratch) {
  with_type(f.dtype, [&](auto tag) {
    InBackward<decltype(untag(tag))>{f, block}.run(column, columns, static_cast<char*>(scratch));
    return 0;
  });
}

void ffn_weights_backward(const FfnWeightsBackward& f, const FfnBlock& block) {
  with_type(f.dtype, [&](auto tag) {
    weights_backward<decltype(untag(tag))>(f, block);
    return 0;
  });
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
