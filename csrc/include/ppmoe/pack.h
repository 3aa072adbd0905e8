// Packing for gemm_kernel.cpp: lines of a matrix (rows of a, columns of b) into panels that the
// micro-kernel reads front to back.
//
// A panel holds `width` lines. Its element (line, d) lies at
// (d / pair) * width * pair + line * pair + d % pair, and whatever sticks out of the matrix is
// zero.
#pragma once

#include "ppmoe/vec.h"

namespace ppmoe::PPMOE_ISA {

PPMOE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What a dtype is multiplied as. Pairs of bfloat16 feed the dot-product instruction where there is
// one; elsewhere they, and float16 everywhere, are widened while packing.
struct Float {
  using Packed = float;
  using Vec = VecF;
  static constexpr int kPair = 1;
};
struct Double {
  using Packed = double;
  using Vec = VecD;
  static constexpr int kPair = 1;
};
struct Bf16Pair {
  using Packed = Bf16;
  using Vec = VecF;
  static constexpr int kPair = 2;
};

template <class T>
struct Scheme {
  using type = Float;
};
template <>
struct Scheme<double> {
  using type = Double;
};
#if defined(__AVX512BF16__)
template <>
struct Scheme<Bf16> {
  using type = Bf16Pair;
};
#endif

template <class S, class T>
PPMOE_INLINE typename S::Packed to_packed(T x) {
  if constexpr (sizeof(typename S::Packed) == sizeof(T)) {
    return x;
  } else {
    return to_float(x);
  }
}

// Two words of a and b by turns, as unpack_low and unpack_high.
PPMOE_INLINE VecI unpack_low_pairs(VecI a, VecI b) {
#if PPMOE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
#elif PPMOE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
#else
  return __builtin_shufflevector(a, b, 0, 1, 4, 5);
#endif
}
PPMOE_INLINE VecI unpack_high_pairs(VecI a, VecI b) {
#if PPMOE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif PPMOE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  return __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// Every other 128 bits of a, then of b: the first ones, or the second ones.
#if PPMOE_VECTOR_BYTES == 64
PPMOE_INLINE VecI even_quarters(VecI a, VecI b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
PPMOE_INLINE VecI odd_quarters(VecI a, VecI b) {
  return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif PPMOE_VECTOR_BYTES == 32
PPMOE_INLINE VecI even_quarters(VecI a, VecI b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
}
PPMOE_INLINE VecI odd_quarters(VecI a, VecI b) {
  return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

// Turns kLanes lines of as many words into vectors of one word of every line.
PPMOE_INLINE void transpose(VecI* r) {
  VecI t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = unpack_low(r[i], r[i + 1]);
    t[i + 1] = unpack_high(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = unpack_low_pairs(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = unpack_high_pairs(t[i + j], t[i + j + 2]);
    }
  }
  // Now the j-th 128 bits of r[4 * i + c] hold column 4 * j + c of lines 4 * i to 4 * i + 3.
#if PPMOE_VECTOR_BYTES == 64
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const VecI p = even_quarters(r[c], r[4 + c]), q = odd_quarters(r[c], r[4 + c]);
    const VecI s = even_quarters(r[8 + c], r[12 + c]), u = odd_quarters(r[8 + c], r[12 + c]);
    t[c] = even_quarters(p, s);
    t[4 + c] = even_quarters(q, u);
    t[8 + c] = odd_quarters(p, s);
    t[12 + c] = odd_quarters(q, u);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
#elif PPMOE_VECTOR_BYTES == 32
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = even_quarters(r[c], r[4 + c]);
    t[4 + c] = odd_quarters(r[c], r[4 + c]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
#endif
}

// A vector of packed words from the front of a line of which `count` elements are left.
template <class S, class T>
PPMOE_INLINE VecI load_words(const T* line, int64_t count) {
  constexpr int elements = kLanes * S::kPair;
  if (count >= elements) {
    if constexpr (S::kPair == 2) {
      return load<VecI>(line);
    } else {
      return reinterpret_cast<VecI>(load_wide(line));
    }
  }
  T part[elements] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = line[i];
  return load_words<S>(part, elements);
}

template <int Width>
PPMOE_INLINE void store_words(char* to, VecI v) {
  if constexpr (Width == kLanes) {
    store(to, v);
  } else {
    __builtin_memcpy(to, &v, Width * 4);
  }
}

// One axis of a matrix: element i lies at at(i), index[i] times the stride where there is an index.
struct Axis {
  int64_t stride;
  const int32_t* index = nullptr;

  PPMOE_INLINE_MEMBER int64_t at(int64_t i) const {
    return (index != nullptr ? int64_t{index[i]} : i) * stride;
  }
  PPMOE_INLINE_MEMBER bool closed() const { return stride == 1 && index == nullptr; }
};

// A matrix as panels take it: its rows are the lines of a, its columns those of b.
template <class T>
struct Lines {
  const T* data;
  Axis line, depth;

  // The same from these on.
  PPMOE_INLINE_MEMBER Lines from(int64_t lines, int64_t deep) const {
    Lines part = *this;
    part.skip(part.line, lines);
    part.skip(part.depth, deep);
    return part;
  }

  PPMOE_INLINE_MEMBER void skip(Axis& axis, int64_t by) {
    if (axis.index != nullptr) {
      axis.index += by;
    } else {
      data += by * axis.stride;
    }
  }
};

// Lines that are contiguous along the depth: kLanes x kLanes words are transposed at a time. A
// width is at most kLanes, or a multiple of it.
template <class S, int Width, class T>
void pack_along_depth(const Lines<T>& m, int64_t lines, int64_t depth, char* to) {
  constexpr int pair = S::kPair;
  constexpr int kPart = Width < kLanes ? Width : kLanes;
  const int64_t words = round_up(depth, pair) / pair;
  for (int group = 0; group < Width; group += kLanes) {
    const int64_t here = lines - group;
    const T* line[kPart];
#pragma GCC unroll 16
    for (int i = 0; i < kPart; ++i) line[i] = i < here ? m.data + m.line.at(group + i) : nullptr;
    for (int64_t word = 0; word < words; word += kLanes) {
      VecI r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        r[i] = i < kPart && i < here
                   ? load_words<S>(line[i < kPart ? i : 0] + word * pair, depth - word * pair)
                   : VecI{};
      }
      transpose(r);
      const int64_t count = least(kLanes, words - word);
      char* cell = to + (word * Width + group) * 4;
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_words<kPart>(cell + i * Width * 4, r[i]);
      } else {
        for (int i = 0; i < count; ++i) store_words<kPart>(cell + i * Width * 4, r[i]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// Two depths of two vectors' worth of lines, zipped into pairs.
PPMOE_INLINE void zip_pairs(const Bf16* this_depth, const Bf16* next_depth, char* to) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  const Words a = load<Words>(this_depth), b = load<Words>(next_depth);
  store(to, __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8,
                                    40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
  store(to + 64, __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22,
                                         54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61,
                                         30, 62, 31, 63));
}
#endif

// Lines that are neighbours in memory: whole vectors of lines are copied, or zipped into pairs.
template <class S, int Width, class T>
void pack_across_lines(const Lines<T>& m, int64_t lines, int64_t depth, char* to) {
  constexpr int kPart = Width < kLanes ? Width : kLanes;
  for (int64_t d = 0; d < depth; d += S::kPair) {
    const T* this_depth = m.data + m.depth.at(d);
    const T* next_depth = d + 1 < depth && S::kPair == 2 ? m.data + m.depth.at(d + 1) : nullptr;
#if defined(__AVX512BF16__)
    if constexpr (S::kPair == 2 && Width == 2 * kLanes) {
      if (lines >= Width && next_depth != nullptr) {
        zip_pairs(this_depth, next_depth, to);
        to += Width * 4;
        continue;
      }
    }
#endif
    for (int group = 0; group < Width; group += kLanes, to += kPart * 4) {
      const int64_t here = least(kPart, lines - group);
      T part[2][kLanes] = {};
      const T* line = this_depth + group;
      const T* next = next_depth != nullptr ? next_depth + group : nullptr;
      if (here < kLanes) {
        for (int64_t i = 0; i < here; ++i) part[0][i] = line[i];
        line = part[0];
      }
      if constexpr (S::kPair == 1) {
        store_words<kPart>(to, reinterpret_cast<VecI>(load_wide(line)));
      } else {
        if (next_depth == nullptr) {
          next = part[1];
        } else if (here < kLanes) {
          for (int64_t i = 0; i < here; ++i) part[1][i] = next[i];
          next = part[1];
        }
        const VecU low = widen(load<VecH>(line));
        const VecU high = widen(load<VecH>(next));
        store_words<kPart>(to, reinterpret_cast<VecI>(low | high << 16));
      }
    }
  }
}

template <class S, int Width, class T>
void pack_panel(const Lines<T>& m, int64_t lines, int64_t depth, typename S::Packed* to) {
  if constexpr (sizeof(typename S::Packed) != 8) {
    if (m.depth.closed()) {
      return pack_along_depth<S, Width>(m, lines, depth, reinterpret_cast<char*>(to));
    }
    if (m.line.closed()) {
      return pack_across_lines<S, Width>(m, lines, depth, reinterpret_cast<char*>(to));
    }
  }
  constexpr int pair = S::kPair;
  for (int64_t d = 0; d < round_up(depth, pair); d += pair) {
    for (int line = 0; line < Width; ++line) {
      for (int p = 0; p < pair; ++p) {
        *to++ = line < lines && d + p < depth
                    ? to_packed<S>(m.data[m.line.at(line) + m.depth.at(d + p)])
                    : typename S::Packed{};
      }
    }
  }
}

// Brings parts of a matrix into the second-level cache, a cache line a call, while the micro-kernel
// is busy: packing them would else wait for memory.
template <class T>
class Prefetcher {
 public:
  Prefetcher() = default;

  // Asks for these lines and depths after those that were added before.
  void add(const Lines<T>& m, int64_t lines, int64_t depth) {
    if (count_ == kParts || lines <= 0 || depth <= 0) return;
    if (m.depth.closed()) {
      parts_[count_++] = {m.data, m.line, lines, depth};
    } else if (m.line.closed()) {
      parts_[count_++] = {m.data, m.depth, depth, lines};
    }
  }

  PPMOE_INLINE_MEMBER void advance() {
    if (part_ == count_) return;
    const Part& part = parts_[part_];
    __builtin_prefetch(part.data + part.outer.at(row_) + done_, 0, 2);
    done_ += 64 / static_cast<int64_t>(sizeof(T));
    if (done_ < part.length) return;
    done_ = 0;
    if (++row_ < part.rows) return;
    row_ = 0;
    ++part_;
  }

 private:
  static constexpr int kParts = 2;
  struct Part {
    const T* data;
    Axis outer;
    int64_t rows, length;
  };
  Part parts_[kParts];
  int count_ = 0, part_ = 0;
  int64_t row_ = 0, done_ = 0;
};

}  // namespace ppmoe::PPMOE_ISA
