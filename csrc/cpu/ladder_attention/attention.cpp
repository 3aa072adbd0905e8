// Attention inside one window, forward.
//
// Scores are held turned, [keys, queries]: sums over keys then run down the vectors, whose lanes
// are queries. Lanes past the last query hold zeros or what comes of them, and are never stored.
#include "cpu/ladder_attention/attention.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// Scratch of one window, in wide elements. Turned queries and turned results share their place, as
// do the rows that both are turned from or into.
template <class T>
struct Layout {
  using W = wide_t<T>;
  int64_t queries, depth;  // padded to whole vectors
  int64_t rows, keys, values, turned, scores, bias, inverse, lone, lone_bias, elements;

  explicit Layout(const Attention& a) {
    constexpr int lanes = kWideVector<W>;
    const int64_t tokens = a.rows.longest() * a.columns.longest();
    queries = round_up(tokens, lanes);
    depth = round_up(a.head_dim, lanes);
    int64_t at = 0;
    const auto take = [&](int64_t count) {
      const int64_t here = at;
      at += round_up(count, lanes);
      return here;
    };
    rows = take(queries * depth);
    keys = take(tokens * depth);
    values = take(tokens * depth);
    turned = take(queries * depth);
    scores = take(tokens * queries);
    bias = a.bias != nullptr ? take(tokens * queries + kBiasSlack) : 0;
    inverse = take(queries);
    lone = take(tokens);
    lone_bias = take(tokens);
    elements = at;
  }
};

// Scores of up to a vector of keys for one query: dot products of whole vectors, which end in
// zeros.
PPMOE_INLINE VecF dot_products(const float* query, const float* keys, int64_t depth, int64_t n) {
  VecI sums[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    VecF total{};
    for (int64_t d = 0; i < n && d < depth; d += kLanes) {
      total += load<VecF>(query + d) * load<VecF>(keys + i * depth + d);
    }
    sums[i] = reinterpret_cast<VecI>(total);
  }
  transpose(sums);
  VecF total = reinterpret_cast<VecF>(sums[0]);
  for (int i = 1; i < kLanes; ++i) total += reinterpret_cast<VecF>(sums[i]);
  return total;
}
PPMOE_INLINE VecD dot_products(const double* query, const double* keys, int64_t depth, int64_t n) {
  VecD sums{};
  for (int64_t i = 0; i < least(n, kBytes / 8); ++i) {
    for (int64_t d = 0; d < depth; ++d) sums[i] += query[d] * keys[i * depth + d];
  }
  return sums;
}

// The last query of a window where it alone would take a vector of its own: 7x7 windows have 49.
// Its keys are in the lanes.
template <class W>
void attend_alone(const Attention& a, int64_t tokens, int64_t depth, const W* keys, const W* values,
                  const W* bias, W* weights, W* row) {
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const V scale = static_cast<W>(a.scale) - V{};
  const V least_score = V{} - static_cast<W>(__builtin_inf());
  V largest = least_score;
  for (int64_t i = 0; i < tokens; i += lanes) {
    V s = dot_products(row, keys + i * depth, depth, tokens - i) * scale;
    if (bias != nullptr) s += load<V>(bias + i);
    if (i + lanes > tokens) s = first_lanes(s, tokens - i, least_score);
    store(weights + i, s);
    largest = s > largest ? s : largest;
  }
  W most = largest[0];
  for (int lane = 1; lane < lanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  V total = V{};
  for (int64_t i = 0; i < tokens; i += lanes) {
    const V e = exponential_below(load<V>(weights + i) - most);
    store(weights + i, e);
    total += e;
  }
  const W inverse = W{1} / sum(total);
  for (int64_t d = 0; d < depth; d += lanes) {
    V value = V{};
    for (int64_t i = 0; i < tokens; ++i) value += weights[i] * load<V>(values + i * depth + d);
    store(row + d, value * inverse);
  }
}

// `fresh` where the bias is not there yet for this head and size of window.
template <class T>
void attend(const Attention& a, const Layout<T>& layout, const Window& window, int64_t head,
            bool fresh, Ahead& ahead, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using S = typename Scheme<W>::type;
  constexpr int lanes = kWideVector<W>;
  const int64_t channel = head * a.head_dim;
  const int64_t tokens = window.tokens(), depth = layout.depth;
  const int64_t queries = round_up(tokens, lanes);
  const bool alone = tokens % lanes == 1 && tokens > lanes;
  const int64_t vectors = queries / lanes - (alone ? 1 : 0);
  W* const rows = scratch + layout.rows;
  W* const keys = scratch + layout.keys;
  W* const values = scratch + layout.values;
  W* const turned = scratch + layout.turned;
  W* const scores = scratch + layout.scores;
  W* const inverse = scratch + layout.inverse;

  const auto read = [&](const Map& map, W* to) {
    window.each<const T>(map, channel, [&](int64_t i, const T* from) {
      widen_row(from, map.channel, a.head_dim, to + i * depth);
    });
  };
  read(a.q, rows);
  for (int64_t i = tokens * depth; i < queries * depth; ++i) rows[i] = 0;
  turn(rows, depth, vectors * lanes, depth, turned, queries);
  read(a.k, keys);
  read(a.v, values);
  multiply<S>({keys, depth, 1}, tokens, {turned, queries}, vectors, a.head_dim, scores, queries,
              false);
  W* bias = nullptr;
  if (a.bias != nullptr) {
    bias = scratch + layout.bias;
    const int64_t table = (2 * a.rows.window - 1) * (2 * a.columns.window - 1);
    if (fresh) {
      spread_bias(a, window, static_cast<const W*>(a.bias) + head * table, bias, queries);
      W* const last = scratch + layout.lone_bias;
      for (int64_t i = 0; alone && i < tokens; ++i) last[i] = bias[i * queries + tokens - 1];
    }
  }
  soften(a, tokens, vectors, queries, bias, scores, inverse, ahead);
  multiply<S>({values, 1, depth}, a.head_dim, {scores, queries}, vectors, tokens, turned, queries,
              false);
  turn(turned, queries, depth, vectors * lanes, rows, depth);
  if (alone) {
    attend_alone(a, tokens, depth, keys, values,
                 bias == nullptr ? bias : scratch + layout.lone_bias, scratch + layout.lone,
                 rows + (tokens - 1) * depth);
    inverse[tokens - 1] = 1;
  }
  window.each<T>(a.out, channel, [&](int64_t i, T* to) {
    const WideVec<W> whole = inverse[i] - WideVec<W>{};
    W* const row = rows + i * depth;
    for (int64_t d = 0; d < depth; d += lanes) store(row + d, load<WideVec<W>>(row + d) * whole);
    narrow_row<T>(row, a.head_dim, to, a.out.channel);
  });
}

}  // namespace

int64_t attention_scratch(const Attention& a) {
  return with_type(a.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return Layout<T>(a).elements * static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void attention(const Attention& a, int64_t begin, int64_t end, int64_t head, int64_t heads,
               void* scratch) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const Layout<T> layout(a);
    for (int64_t h = head; h < head + heads; ++h) {
      Window window(a, begin);
      bool fresh = true;
      for (int64_t number = begin; number < end; ++number) {
        const Window next(a, number + 1 < end ? number + 1 : begin);
        const bool more = number + 1 < end || h + 1 < head + heads;
        const int64_t channel = (number + 1 < end ? h : h + 1) * a.head_dim;
        Ahead ahead;
        if (more) ahead = Ahead(a, next, channel, sizeof(T));
        attend<T>(a, layout, window, h, fresh, ahead, static_cast<wide_t<T>*>(scratch));
        fresh = !next.same_size(window);
        window = next;
      }
    }
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
