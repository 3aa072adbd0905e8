// What the backward kernels of ladder_ffn share: vectors and scratch behind those of the forward,
// and where rows and sums lie.
#pragma once

#include "cpu/ladder_attention/ffn.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// Behind those of the forward, which are folded as in evaluation, but for the bias of w2.
enum BackwardVector : int {
  kInverse = kVectorCount,  // 1 / sqrt(var + eps) of the norms
  kPlainTaps = kInverse + 3,
  kMeanGrad = kPlainTaps + 9,  // of a norm's result, over pixels; zero in evaluation
  kMeanProduct = kMeanGrad +
      3,  // of that times what is normalised, times kInverse squared; likewise
  kSumG3 = kMeanProduct + 3,
  kBackwardCount = kSumG3 + 1,
};

template <class T>
struct PreparedBackward : Prepared<T> {
  Weights<T> w1_turned, w2_turned;

  PreparedBackward(char* at, int64_t g)
      : Prepared<T>(at, g),
        w1_turned{reinterpret_cast<Packed<T>*>(at + front(g)), g, g},
        w2_turned{reinterpret_cast<Packed<T>*>(at + front(g) + Prepared<T>::weight_bytes(g)), g,
                  g} {}

  static int64_t front(int64_t g) {
    const int64_t more = (int{kBackwardCount} - int{kVectorCount}) * padded_columns<T>(g);
    return round_up(Prepared<T>::bytes(g) + more * static_cast<int64_t>(sizeof(wide_t<T>)), 64);
  }
  static int64_t bytes(int64_t g) { return front(g) + 2 * Prepared<T>::weight_bytes(g); }
};

#if defined(__AVX512BF16__)
// Rows 2 i and 2 i + 1 of `from` as pairs; the last row of an odd number is paired with zeros.
PPMOE_INLINE void zip_rows(const Bf16* from, int64_t stride, int64_t rows, int64_t columns,
                           Bf16* to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, to += 2 * columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const VecU low = widen(load<VecH>(from + j));
      const VecU high = i + 1 < rows ? widen(load<VecH>(from + stride + j)) : VecU{};
      store(to + 2 * j, low | high << 16);
    }
  }
}
#endif

// Behind Scratch: rows of two units on both sides of a weight's product, the same as pairs, copies
// of rows of the gradient, and rows of a group.
template <class T>
struct BackwardScratch : Scratch<T> {
  using P = Packed<T>;
  P *left, *right, *left_pairs, *right_pairs, *group;
  T* grad_copies;

  static constexpr int64_t kBlocks = Scheme<T>::type::kPair == 2 ? 4 : 2;
  static int64_t front(int64_t g) {
    return Scratch<T>::bytes(g) + round_up(Scratch<T>::copy_bytes(g), 64);
  }
  static int64_t bytes(int64_t g) { return front(g) + 2 * kBlocks * Scratch<T>::packed_bytes(g); }
  BackwardScratch(void* at, int64_t g) : Scratch<T>(at, g) {
    const int64_t block = 2 * kFfnUnit * row_stride<T>(g);
    grad_copies = reinterpret_cast<T*>(static_cast<char*>(at) + Scratch<T>::bytes(g));
    left = reinterpret_cast<P*>(static_cast<char*>(at) + front(g));
    right = left + block;
    left_pairs = right + block;
    right_pairs = left_pairs + block;
    group = left + kBlocks * block;
  }
};

// The backward of one call.
template <class T>
struct BackwardRows {
  using P = Packed<T>;
  using W = wide_t<T>;
  using V = WideVec<T>;
  using S = typename Scheme<T>::type;
  static constexpr int kStep = kWideLanes<T>;
  const FfnBackward& b;
  const Ffn& f{b.forward};
  PreparedBackward<T> p{f.prepared, f.channels};
  int64_t stride = row_stride<T>(f.channels);

  PPMOE_INLINE_MEMBER V vector(int which, int64_t j) const { return load<V>(p.vector(which) + j); }

  P* rows(char* data, const Unit& unit) const {
    return reinterpret_cast<P*>(data) + unit.begin * stride;
  }
  W* sums(int64_t group, int which = 0) const {
    return reinterpret_cast<W*>(b.sums) + (group * kFfnGradientSums + which) * p.pitch;
  }
  W* weight_sums(char* data, int64_t group) const {
    return reinterpret_cast<W*>(data) + group * f.channels * p.pitch;
  }
  PPMOE_INLINE_MEMBER void clear(W* to, int count) const {
    for (int64_t j = 0; j < count * p.pitch; ++j) to[j] = W{};
  }
  PPMOE_INLINE_MEMBER static void add(W* to, V value) { store(to, load<V>(to) + value); }
};

}  // namespace
}  // namespace ppmoe::ladder_attention::PPMOE_ISA
