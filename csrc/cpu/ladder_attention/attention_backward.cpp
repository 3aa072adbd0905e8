// Attention inside one window, backward: the scores once more, and what is derived from them.
// Everything is in wide elements; scores are held turned, as in the forward.
#include "cpu/ladder_attention/attention.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

template <class T>
struct Layout {
  using W = wide_t<T>;
  int64_t queries, depth;  // padded to whole vectors
  int64_t q, k, v, grad, q_turned, grad_turned, result, weights, grads, bias, inverse, elements;

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
    q = take(queries * depth);
    k = take(tokens * depth);
    v = take(tokens * depth);
    grad = take(queries * depth);
    q_turned = take(queries * depth);
    grad_turned = take(queries * depth);
    result = take(queries * depth);
    weights = take(tokens * queries);
    grads = take(tokens * queries);
    bias = a.bias != nullptr ? take(tokens * queries + kBiasSlack) : 0;
    inverse = take(queries);
    elements = at;
  }
};

// grads [keys, queries] = weights * (grads - sum over keys of weights * grads), where the weights
// are made whole by `inverse`.
template <class W>
void soften_backward(int64_t tokens, int64_t vectors, int64_t stride, const W* inverse, W* weights,
                     W* grads) {
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  for (int64_t j = 0; j < vectors * lanes; j += lanes) {
    const V whole = load<V>(inverse + j);
    V total = V{};
    for (int64_t i = 0; i < tokens; ++i) {
      const V weight = load<V>(weights + i * stride + j) * whole;
      store(weights + i * stride + j, weight);
      total += weight * load<V>(grads + i * stride + j);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      W* const cell = grads + i * stride + j;
      store(cell, load<V>(weights + i * stride + j) * (load<V>(cell) - total));
    }
  }
}

// table += the gradients of the scores, each in the row of its offset.
template <class W>
void gather_bias(const Attention& a, const Window& w, const W* grads, int64_t stride, W* table) {
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const int64_t across = 2 * a.columns.window - 1;
  for (int64_t kr = 0; kr < w.height; ++kr) {
    for (int64_t kc = 0; kc < w.width; ++kc, grads += stride) {
      W* to = table + (a.rows.window - 1 - kr) * across + a.columns.window - 1 - kc;
      const W* from = grads;
      for (int64_t r = 0; r < w.height; ++r, to += across, from += w.width) {
        for (int64_t j = 0; j < w.width; j += lanes) {
          const int64_t rest = w.width - j;
          // The lanes of the next run add nothing here.
          V value = load<V>(from + j);
          if (rest < lanes) value = first_lanes(value, rest);
          store(to + j, load<V>(to + j) + value);
        }
      }
    }
  }
}

template <class T>
void attend_backward(const AttentionBackward& b, const Layout<T>& layout, int64_t number,
                     int64_t head, Ahead& ahead, wide_t<T>* table, wide_t<T>* scratch) {
  using W = wide_t<T>;
  using S = typename Scheme<W>::type;
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const Attention& a = b.forward;
  const Window window(a, number);
  const int64_t channel = head * a.head_dim, tokens = window.tokens(), depth = layout.depth;
  const int64_t vectors = (tokens + lanes - 1) / lanes, queries = vectors * lanes;
  const int64_t deep = depth / lanes;
  W *const q = scratch + layout.q, *const k = scratch + layout.k, *const v = scratch + layout.v;
  W *const grad = scratch + layout.grad, *const result = scratch + layout.result;
  W *const q_turned = scratch + layout.q_turned, *const weights = scratch + layout.weights;
  W *const grad_turned = scratch + layout.grad_turned, *const grads = scratch + layout.grads;
  W* const inverse = scratch + layout.inverse;

  const auto read = [&](const Map& map, W* to) {
    window.each<const T>(map, channel, [&](int64_t i, const T* from) {
      widen_row(from, map.channel, a.head_dim, to + i * depth);
    });
  };
  const auto write = [&](const Map& map, const W* from) {
    window.each<T>(map, channel, [&](int64_t i, T* to) {
      narrow_row<T>(from + i * depth, a.head_dim, to, map.channel);
    });
  };
  read(a.q, q);
  read(a.k, k);
  read(a.v, v);
  read(b.grad, grad);
  for (int64_t i = tokens * depth; i < queries * depth; ++i) q[i] = grad[i] = 0;
  turn(q, depth, queries, depth, q_turned, queries);
  turn(grad, depth, queries, depth, grad_turned, queries);
  multiply<S>({k, depth, 1}, tokens, {q_turned, queries}, vectors, a.head_dim, weights, queries,
              false);
  W* bias = nullptr;
  if (a.bias != nullptr) {
    bias = scratch + layout.bias;
    const int64_t offsets = (2 * a.rows.window - 1) * (2 * a.columns.window - 1);
    spread_bias(a, window, static_cast<const W*>(a.bias) + head * offsets, bias, queries);
  }
  soften(a, tokens, vectors, queries, bias, weights, inverse, ahead);
  multiply<S>({v, depth, 1}, tokens, {grad_turned, queries}, vectors, a.head_dim, grads, queries,
              false);
  soften_backward(tokens, vectors, queries, inverse, weights, grads);
  if (table != nullptr) gather_bias(a, window, grads, queries, table);

  if (a.out.data != nullptr) {
    multiply<S>({v, 1, depth}, a.head_dim, {weights, queries}, vectors, tokens, q_turned, queries,
                false);
    turn(q_turned, queries, depth, queries, result, depth);
    write(a.out, result);
  }
  // The gradients of v and k sum over queries, that of q over keys.
  multiply<S>({weights, queries, 1}, tokens, {grad, depth}, deep, tokens, result, depth, false);
  write(b.grad_v, result);
  const V scale = static_cast<W>(a.scale) - V{};
  for (int64_t i = 0; i < tokens * queries; i += lanes) {
    store(grads + i, load<V>(grads + i) * scale);
  }
  multiply<S>({grads, queries, 1}, tokens, {q, depth}, deep, tokens, result, depth, false);
  write(b.grad_k, result);
  multiply<S>({k, 1, depth}, a.head_dim, {grads, queries}, vectors, tokens, q_turned, queries,
              false);
  turn(q_turned, queries, depth, queries, result, depth);
  write(b.grad_q, result);
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& b) {
  return with_type(b.forward.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return Layout<T>(b.forward).elements * static_cast<int64_t>(sizeof(wide_t<T>));
  });
}

void attention_backward(const AttentionBackward& b, int64_t head, int64_t begin, int64_t end,
                        void* table, void* scratch) {
  with_type(b.forward.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const Layout<T> layout(b.forward);
    for (int64_t number = begin; number < end; ++number) {
      Ahead ahead;
      if (number + 1 < end) {
        ahead =
            Ahead(b.forward, Window(b.forward, number + 1), head * b.forward.head_dim, sizeof(T));
      }
      attend_backward<T>(b, layout, number, head, ahead, static_cast<wide_t<T>*>(table),
                         static_cast<wide_t<T>*>(scratch));
    }
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
