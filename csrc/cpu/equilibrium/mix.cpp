// anderson_mix: the two passes over a sample, in blocks that stay in the nearest cache.
#include "cpu/equilibrium/mix_kernels.h"
#include "ppmoe/stream.h"
#include "ppmoe/vec.h"

namespace ppmoe::mix::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

namespace {

// Lanes are summed in the wide dtype within a block, and blocks in double.
constexpr int64_t kBlock = 1024;

template <bool kWhole>
struct Part {};

// Whole vectors, or the last one, whose missing lanes are zeros and are not stored.
template <class T>
PPMOE_INLINE WideVec<T> load_lanes(const T* from, int64_t, Part<true>) {
  return load_wide(from);
}
template <class T>
PPMOE_INLINE WideVec<T> load_lanes(const T* from, int64_t count, Part<false>) {
  WideVec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(from[i]);
  return v;
}
template <class T>
PPMOE_INLINE void store_lanes(T* to, WideVec<T> v, int64_t, Part<true>) {
  store_wide(to, v);
}
template <class T>
PPMOE_INLINE void store_lanes(T* to, WideVec<T> v, int64_t count, Part<false>) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(v[i]);
}

// Runs body(i, lanes, part) over vectors of `count` elements.
template <class T, class F>
PPMOE_INLINE void by_vectors(int64_t count, const F& body) {
  constexpr int64_t lanes = kWideLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, lanes, Part<true>{});
  if (i < count) body(i, count - i, Part<false>{});
}

// Rows of a history that no cache would keep until the next step.
template <class W, class V>
PPMOE_INLINE void stream_lanes(W* to, V v, bool past, int64_t, Part<true>) {
  past ? stream_vector(reinterpret_cast<char*>(to), reinterpret_cast<VecI>(v)) : store(to, v);
}
template <class W, class V>
PPMOE_INLINE void stream_lanes(W* to, V v, bool, int64_t count, Part<false>) {
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

template <class T>
struct Block {
  using W = wide_t<T>;
  const T* f;
  T *z, *z_next, *best_z, *best_f;
  W *dg, *df;
  int64_t width, count;
  bool stream;

  Block(const Sample& s, int64_t at, int64_t end)
      : f(static_cast<const T*>(s.f) + at),
        z(static_cast<T*>(s.z) + at),
        z_next(static_cast<T*>(s.z_next) + at),
        best_z(static_cast<T*>(s.best_z) + at),
        best_f(static_cast<T*>(s.best_f) + at),
        dg(s.dg != nullptr ? static_cast<W*>(s.dg) + at : nullptr),
        df(static_cast<W*>(s.df) + at),
        width(s.width),
        count(end - at < kBlock ? end - at : kBlock),
        stream(s.stream) {}
  bool past(const W* row) const { return stream && aligned(row); }
  W* dg_row(int row) const { return dg + row * width; }
  W* df_row(int row) const { return df + row * width; }
};

template <class T>
void measure_block(const Sample& s, const Block<T>& b, double* sums) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  alignas(64) W g[kBlock], change[kBlock];
  V gg{}, ff{}, zz{}, nn{}, ng{};
  const bool differs = b.dg != nullptr && !s.first;
  W* const row = b.dg != nullptr ? b.dg_row(s.slot) : nullptr;
  const W* ahead = differs && s.held > 0 ? b.dg_row(s.rows[0]) : row;
  by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
    const V fv = load_lanes(b.f + i, n, part), zv = load_lanes(b.z + i, n, part), gv = fv - zv;
    gg += gv * gv;
    ff += fv * fv;
    zz += zv * zv;
    store(g + i, gv);
    if (differs) {
      __builtin_prefetch(ahead + i);
      const V next = gv - load_lanes(row + i, n, part);
      nn += next * next;
      ng += next * gv;
      store(change + i, next);
      store_lanes(row + i, next, n, part);
    }
  });
  sums[kSquareG] += static_cast<double>(sum(gg));
  sums[kSquareF] += static_cast<double>(sum(ff));
  sums[kSquareZ] += static_cast<double>(sum(zz));
  if (b.dg == nullptr) return;
  if (differs) {
    sums[kSquareNew] += static_cast<double>(sum(nn));
    sums[kNewG] += static_cast<double>(sum(ng));
    for (int j = 0; j < s.held; ++j) {
      const W* const held = b.dg_row(s.rows[j]);
      ahead = j + 1 < s.held ? b.dg_row(s.rows[j + 1]) : row + kBlock;
      V with_new{}, with_g{};
      by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
        __builtin_prefetch(ahead + i);
        const V v = load_lanes(held + i, n, part);
        with_new += v * load<V>(change + i);
        with_g += v * load<V>(g + i);
      });
      sums[kHeld + 2 * j] += static_cast<double>(sum(with_new));
      sums[kHeld + 2 * j + 1] += static_cast<double>(sum(with_g));
    }
  }
  W* const next = b.dg_row(s.next);
  const bool past = b.past(next);
  by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
    stream_lanes(next + i, load<V>(g + i), past, n, part);
  });
}

template <class T>
PPMOE_INLINE void copy(T* to, const T* from, int64_t count) {
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
void mix_block(const Sample& s, const Choice& c, const Block<T>& b) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  W* const last = b.df_row(s.slot);
  if (c.keep_old) {
    copy(b.best_z, b.z_next, b.count);
    by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
      store_lanes(b.best_f + i, load_lanes(last + i, n, part), n, part);
    });
  }
  if (c.keep_new) {
    copy(b.best_z, b.z, b.count);
    copy(b.best_f, b.f, b.count);
  }
  if (c.stop) {
    copy(b.z_next, b.best_z, b.count);
    if (c.put_back) copy(b.z, b.best_z, b.count);
    return;
  }
  alignas(64) W mixed[kBlock];
  W* const next = b.df_row(s.next);
  const W* const change = b.dg != nullptr ? b.dg_row(s.slot) : nullptr;
  const bool past = b.past(next);
  const W* ahead = c.held > 0 ? b.df_row(s.rows[0]) : last + kBlock;
  const W weight = static_cast<W>(c.weight), left = static_cast<W>(c.left);
  by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
    const V fv = load_lanes(b.f + i, n, part);
    V v = fv;
    if (c.push) {
      __builtin_prefetch(ahead + i);
      const V d = fv - load_lanes(last + i, n, part);
      store_lanes(last + i, d, n, part);
      v -= d * weight;
    }
    if (left != 0) {
      V g = fv - load_lanes(b.z + i, n, part);
      if (c.push) g -= load_lanes(change + i, n, part) * weight;
      v -= g * left;
    }
    stream_lanes(next + i, fv, past, n, part);
    store(mixed + i, v);
  });
  for (int j = 0; j < c.held; ++j) {
    const W* const from = b.df_row(s.rows[j]);
    const W each = static_cast<W>(c.weights[j]);
    ahead = j + 1 < c.held ? b.df_row(s.rows[j + 1]) : last + kBlock;
    by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
      __builtin_prefetch(ahead + i);
      store(mixed + i, load<V>(mixed + i) - load_lanes(from + i, n, part) * each);
    });
    if (left == 0) continue;
    const W* const rest = b.dg_row(s.rows[j]);
    by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
      store(mixed + i, load<V>(mixed + i) + load_lanes(rest + i, n, part) * (each * left));
    });
  }
  by_vectors<T>(b.count, [&](int64_t i, int64_t n, auto part) {
    store_lanes(b.z_next + i, load<V>(mixed + i), n, part);
  });
}

void measure(const Sample& s, int64_t begin, int64_t end, double* sums) {
  with_type(s.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    for (int64_t at = begin; at < end; at += kBlock) {
      measure_block<T>(s, Block<T>(s, at, end), sums);
    }
    if (s.stream) stream_fence();
  });
}

void mix(const Sample& s, const Choice& c, int64_t begin, int64_t end) {
  with_type(s.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    for (int64_t at = begin; at < end; at += kBlock) mix_block<T>(s, c, Block<T>(s, at, end));
    if (s.stream) stream_fence();
  });
}

}  // namespace

const Kernels kKernels = {measure, mix};

}  // namespace ppmoe::mix::PPMOE_ISA
