// The two halves of expert_ffn: products with an activation behind them, and products that are
// merged into the rows of their tokens.
#include "cpu/expert_slice/declare.h"
#include "ppmoe/activation.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

template <class T, Activation kActivation, bool kGated>
void activate_row(const wide_t<T>* gate, const wide_t<T>* up, int64_t columns, T* out) {
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  V slope;
  for (int64_t j = 0; j < columns; j += lanes) {
    // Rows of the tile and of the stage hold whole vectors; what is past the columns is not used.
    V value = activate<kActivation>(load<V>(gate + j), slope);
    if constexpr (kGated) value *= load<V>(up + j);
    store_wide(out + j, value);
  }
}

template <class T, Activation kActivation>
PPMOE_INLINE void activate_row(bool gated, const wide_t<T>* gate, const wide_t<T>* up,
                               int64_t columns, T* out) {
  if (gated) return activate_row<T, kActivation, true>(gate, up, columns, out);
  activate_row<T, kActivation, false>(gate, up, columns, out);
}

// Adds the bias to a row of the tile and keeps it, rounded, where it is asked for.
template <class T>
PPMOE_INLINE void finish_row(wide_t<T>* row, const T* bias, int64_t columns, T* pre) {
  constexpr int lanes = kWideLanes<T>;
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) {
    WideVec<T> value = load_wide(row + j);
    if (bias != nullptr) store_wide(row + j, value += load_wide(bias + j));
    if (pre != nullptr) store_wide(pre + j, value);
  }
  for (; j < columns; ++j) {
    if (bias != nullptr) row[j] += to_float(bias[j]);
    if (pre != nullptr) pre[j] = narrow<T>(row[j]);
  }
}

template <class T>
struct In {
  const FfnIn& f;
  const FfnBlock& block;
  int64_t halves = f.gated ? 2 : 1;
  Axis tokens{f.x_stride, f.tokens + block.row};
  Lines<T> x{static_cast<const T*>(f.x), tokens, {1}};
  Lines<T> w{static_cast<const T*>(f.w_in.data) + block.expert * f.w_in.expert,
             {f.w_in.row},
             {f.w_in.col}};
  bool thin = is_thin(block.group, x.depth, w.depth);
  int64_t most = kSlabColumns / halves;  // columns of a slab, of either half
  int64_t tile_bytes = Tile<T>::bytes(block.rows, most, halves);
  int64_t slab = thin ? 0 : round_up(slab_bytes<T>(most, halves, f.hidden), 64);
  int64_t rows_bytes = round_up(kStage * (most + 16) * static_cast<int64_t>(sizeof(T)), 64);

  static constexpr int64_t kStage = kThinRows > kRows ? kThinRows : kRows;

  int64_t scratch() const {
    return tile_bytes + slab + rows_bytes + (thin ? 0 : Panels<T>::bytes(block.rows, f.hidden));
  }

  // The tile's rows become activations and go to where the second product reads them.
  void store(const Tile<T>& tile, int64_t first, int64_t columns, T* stage) const {
    const int64_t width = f.width, pitch = most + 16;
    const T* bias = static_cast<const T*>(f.b_in) + block.expert * halves * width + first;
    const bool plain = f.plain && block.group <= kThinRows;
    T* const rows = reinterpret_cast<T*>(f.panels + block.panels);
    const Panels<T> panels(rows, block.rows, width);
    for (int64_t row = 0; row < block.rows;) {
      const int64_t wide = plain ? block.rows : panel_rows(block.rows - row);
      const int64_t count = least(wide, block.rows - row);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t half = 0; half < halves; ++half) {
          T* pre = f.pre == nullptr
                       ? nullptr
                       : static_cast<T*>(f.pre) + (block.row + row + i) * halves * width +
                             half * width + first;
          finish_row<T>(tile.row(row + i, half), f.b_in == nullptr ? nullptr : bias + half * width,
                        columns, pre);
        }
        const wide_t<T>* gate = tile.row(row + i);
        const wide_t<T>* up = halves == 2 ? tile.row(row + i, 1) : nullptr;
        T* out = stage + i * pitch;
        switch (f.activation) {
          case Activation::kGelu:
            activate_row<T, Activation::kGelu>(f.gated, gate, up, columns, out);
            break;
          case Activation::kGeluTanh:
            activate_row<T, Activation::kGeluTanh>(f.gated, gate, up, columns, out);
            break;
          case Activation::kRelu:
            activate_row<T, Activation::kRelu>(f.gated, gate, up, columns, out);
            break;
          default:  // kSilu, the last one that experts have
            activate_row<T, Activation::kSilu>(f.gated, gate, up, columns, out);
            break;
        }
        if (plain) {
          __builtin_memcpy(rows + i * width + first, out, static_cast<size_t>(columns) * sizeof(T));
        }
      }
      if (!plain) panels.pack(row, wide, {stage, {pitch}, {1}}, count, first, columns);
      row += wide;
    }
  }

  void run(int64_t column, int64_t columns, char* scratch) const {
    const int64_t width = f.width;
    T* const stage = reinterpret_cast<T*>(scratch + tile_bytes + slab);
    const Panels<T> panels(scratch + tile_bytes + slab + rows_bytes, block.rows, f.hidden);
    for (int64_t row = 0; row < block.rows && !thin;) {
      const int64_t wide = panel_rows(block.rows - row);
      panels.pack(row, wide, x.from(row, 0), least(wide, block.rows - row), 0, f.hidden);
      row += wide;
    }
    const auto slab_at = [&](int64_t first) {
      return Slab<T>{w.from(first, 0), least(most, column + columns - first), halves,
                     width * f.w_in.row};
    };
    for (int64_t first = column; first < column + columns; first += most) {
      const Slab<T> here = slab_at(first);
      const Tile<T> tile(scratch, here.columns, halves);
      const Slab<T> next = slab_at(first + most);
      if (thin) {
        multiply_thin(x, block.rows, f.hidden, here, tile, next.columns > 0 ? &next : nullptr);
      } else {
        multiply_slab(panels, block.rows, block.group, here, false, scratch + tile_bytes, tile,
                      &next);
      }
      store(tile, first, here.columns, stage);
    }
  }
};

// A product that is rounded before it is added: fused, the sum of two ranks' parts would differ
// from the sum on one rank.
template <class V>
PPMOE_INLINE V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#else
  volatile V kept = product;
  product = kept;
#endif
  return product;
}
#if defined(__AVX512F__)
PPMOE_INLINE VecF rounded(VecF product) {
  asm("" : "+v"(product));
  return product;
}
PPMOE_INLINE VecD rounded(VecD product) {
  asm("" : "+v"(product));
  return product;
}
#endif

template <class T>
struct Out {
  const FfnOut& f;
  const FfnOutTask& task;
  static constexpr bool kDirect = sizeof(T) == sizeof(wide_t<T>);  // sums are kept in out itself

  struct Bytes {
    int64_t tile, slab, sums;
  };
  Bytes bytes() const {
    int64_t rows = 0;
    for (int64_t i = 0; i < task.count; ++i) {
      if (task.blocks[i].rows > rows) rows = task.blocks[i].rows;
    }
    const int64_t wide = sizeof(wide_t<T>);
    return {Tile<T>::bytes(rows, task.columns, 1),
            round_up(slab_bytes<T>(task.columns, 1, f.depth), 64),
            kDirect ? 0 : task.tokens * task.columns * wide};
  }

  Slab<T> slab_of(const FfnBlock& block, int64_t part) const {
    const T* w = static_cast<const T*>(f.w.data) + block.expert * f.w.expert +
                 part * f.depth * f.w.row + task.column * f.w.col;
    return {{w, {f.w.col}, {f.w.row}}, task.columns, 1, 0};
  }

  void merge(const FfnBlock& block, const Tile<T>& tile, wide_t<T>* sums, int64_t stride) const {
    using V = WideVec<T>;
    constexpr int lanes = kWideLanes<T>;
    const T* bias = f.bias == nullptr
                        ? nullptr
                        : static_cast<const T*>(f.bias) + block.expert * f.hidden + task.column;
    for (int64_t i = 0; i < block.rows; ++i) {
      const wide_t<T>* row = tile.row(i);
      wide_t<T>* to = sums + (f.tokens[block.row + i] - task.first) * stride;
      const wide_t<T> weight =
          f.weights != nullptr ? static_cast<const wide_t<T>*>(f.weights)[block.row + i] : 1;
      int64_t j = 0;
      for (; j + lanes <= task.columns; j += lanes) {
        V value = load<V>(row + j);
        if (bias != nullptr) value += load_wide(bias + j);
        store(to + j, load<V>(to + j) + rounded(value * weight));
      }
      for (; j < task.columns; ++j) {
        wide_t<T> value = row[j];
        if (bias != nullptr) value += to_float(bias[j]);
        to[j] += rounded(value * weight);
      }
    }
  }

  void run(char* scratch) const {
    const Bytes size = bytes();
    T* const out = static_cast<T*>(f.out) + task.first * f.hidden + task.column;
    wide_t<T>* sums;
    int64_t stride;
    if constexpr (kDirect) {
      sums = out;
      stride = f.hidden;
    } else {
      sums = reinterpret_cast<wide_t<T>*>(scratch + size.tile + size.slab);
      stride = task.columns;
    }
    for (int64_t t = 0; t < task.tokens; ++t) {
      __builtin_memset(static_cast<void*>(sums + t * stride), 0,
                       static_cast<size_t>(task.columns) * sizeof(wide_t<T>));
    }
    const Tile<T> tile(scratch, task.columns, 1);
    for (int64_t i = 0; i < task.count; ++i) {
      const FfnBlock& block = task.blocks[i];
      const char* const at = f.panels + block.panels;
      if (f.plain && block.group <= kThinRows) {
        const Lines<T> rows{reinterpret_cast<const T*>(at), {f.depth}, {1}};
        const Slab<T> next = slab_of(task.blocks[least(i + 1, task.count - 1)], 0);
        multiply_thin(rows, block.rows, f.depth, slab_of(block, 0), tile,
                      i + 1 < task.count ? &next : nullptr);
      } else {
        const int64_t part_bytes = Panels<T>::bytes(block.rows, f.depth);
        for (int64_t part = 0; part < f.depths; ++part) {
          const bool last = part + 1 == f.depths, more = !last || i + 1 < task.count;
          const Slab<T> next = slab_of(task.blocks[last && more ? i + 1 : i], last ? 0 : part + 1);
          const Panels<T> panels(const_cast<char*>(at) + part * part_bytes, block.rows, f.depth);
          multiply_slab(panels, block.rows, block.group, slab_of(block, part), part != 0,
                        scratch + size.tile, tile, more ? &next : nullptr);
        }
      }
      merge(block, tile, sums, stride);
    }
    if constexpr (!kDirect) {
      for (int64_t t = 0; t < task.tokens; ++t) {
        store_row<T>(sums + t * stride, nullptr, task.columns, out + t * f.hidden);
      }
    }
  }
};

}  // namespace

int64_t ffn_panel_bytes(DType dtype, int64_t rows, int64_t depth, int64_t parts) {
  return with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return parts * Panels<T>::bytes(rows, depth);
  });
}

int64_t ffn_in_scratch(const FfnIn& f, const FfnBlock& block) {
  return with_type(f.dtype, [&](auto tag) { return In<decltype(untag(tag))>{f, block}.scratch(); });
}

void ffn_in(const FfnIn& f, const FfnBlock& block, int64_t column, int64_t columns, void* scratch) {
  with_type(f.dtype, [&](auto tag) {
    In<decltype(untag(tag))>{f, block}.run(column, columns, static_cast<char*>(scratch));
    return 0;
  });
}

int64_t ffn_out_scratch(const FfnOut& f, const FfnOutTask& task) {
  return with_type(f.dtype, [&](auto tag) {
    const auto bytes = Out<decltype(untag(tag))>{f, task}.bytes();
    return bytes.tile + bytes.slab + bytes.sums;
  });
}

void ffn_out(const FfnOut& f, const FfnOutTask& task, void* scratch) {
  with_type(f.dtype, [&](auto tag) {
    Out<decltype(untag(tag))>{f, task}.run(static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
