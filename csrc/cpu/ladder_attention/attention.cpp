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

// `fresh` where the bias is not there yet for this head and size of window.
template <class T>
void attend(const Attention& a, const Layout<T>& layout, const Window& window, int64_t head,
            bool fresh, Ahead& ahead, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using S = typename Scheme<W>::type;
  constexpr int lanes = kWideVector<W>;
  const int64_t channel = head * a.head_dim;
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
  for (int64_t i = tokens * depth; i < queries * depth; ++i) rows[i] = 0;
  turn(rows, depth, queries, depth, turned, queries);
  read(a.k, keys);
  read(a.v, values);
  multiply<S>({keys, depth, 1}, tokens, {turned, queries}, vectors, a.head_dim, scores, queries,
              false);
  W* bias = nullptr;
  if (a.bias != nullptr) {
    bias = scratch + layout.bias;
    const int64_t table = (2 * a.rows.window - 1) * (2 * a.columns.window - 1);
    if (fresh) spread_bias(a, window, static_cast<const W*>(a.bias) + head * table, bias, queries);
  }
  soften(a, tokens, vectors, queries, bias, scores, inverse, ahead);
  multiply<S>({values, 1, depth}, a.head_dim, {scores, queries}, vectors, tokens, turned, queries,
              false);
  turn(turned, queries, depth, queries, rows, depth);
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
