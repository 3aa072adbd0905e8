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
  int64_t queries, depth;                          // padded to whole vectors
  int64_t rows, keys, values, turned, scores, bias, inverse, elements;

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
    elements = at;
  }
};

template <class T>
void attend(const Attention& a, const Layout<T>& layout, int64_t unit, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using S = typename Scheme<W>::type;
  constexpr int lanes = kWideVector<W>;
  const Window window(a, unit / a.heads);
  const int64_t head = unit % a.heads, channel = head * a.head_dim;
  const int64_t tokens = window.tokens(), depth = layout.depth;
  const int64_t vectors = (tokens + lanes - 1) / lanes, queries = vectors * lanes;
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
  read(a.k, keys);
  read(a.v, values);
  for (int64_t i = tokens * depth; i < queries * depth; ++i) rows[i] = 0;
  turn(rows, depth, queries, depth, turned, queries);
  multiply<S>({keys, depth, 1}, tokens, {turned, queries}, vectors, a.head_dim, scores, queries,
              false);
  W* bias = nullptr;
  if (a.bias != nullptr) {
    bias = scratch + layout.bias;
    const int64_t table = (2 * a.rows.window - 1) * (2 * a.columns.window - 1);
    spread_bias(a, window, static_cast<const W*>(a.bias) + head * table, bias, queries);
  }
  soften(a, tokens, vectors, queries, bias, scores, inverse);
  multiply<S>({values, 1, depth}, a.head_dim, {scores, queries}, vectors, tokens, turned, queries,
              false);
  for (int64_t d = 0; d < a.head_dim; ++d) {
    for (int64_t j = 0; j < queries; j += lanes) {
      W* const cell = turned + d * queries + j;
      store(cell, load<WideVec<W>>(cell) * load<WideVec<W>>(inverse + j));
    }
  }
  turn(turned, queries, depth, queries, rows, depth);
  window.each<T>(a.out, channel, [&](int64_t i, T* to) {
    narrow_row<T>(rows + i * depth, a.head_dim, to, a.out.channel);
  });
}

}  // namespace

int64_t attention_scratch(const Attention& a) {
  return with_type(a.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return Layout<T>(a).elements * static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void attention(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const Layout<T> layout(a);
    for (int64_t unit = begin; unit < end; ++unit) {
      attend<T>(a, layout, unit, static_cast<wide_t<T>*>(scratch));
    }
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
