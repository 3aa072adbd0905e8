// expert_index: a stable counting sort of the local slots by expert.
//
// With AVX-512, ids are taken 16 at a time; where some of the 16 are foreign, the local ones are
// first moved together, so that foreign slots cost no branch of their own.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

// An id's distance from the first local expert, which wraps around to a large number below it.
PPMOE_INLINE uint32_t local_number(int32_t id, int64_t first) {
  return static_cast<uint32_t>(id) - static_cast<uint32_t>(first);
}

PPMOE_INLINE uint32_t local_number(int64_t id, int64_t first) {
  const uint64_t distance = static_cast<uint64_t>(id) - static_cast<uint64_t>(first);
  return distance < 0xffffffffu ? static_cast<uint32_t>(distance) : 0xffffffffu;
}

#if defined(__AVX512F__)
PPMOE_INLINE VecU local_numbers(const int32_t* ids, int64_t first) {
  return load<VecU>(ids) - static_cast<uint32_t>(first);
}

PPMOE_INLINE VecU local_numbers(const int64_t* ids, int64_t first) {
  VecU numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = local_number(ids[i], first);
  return numbers;
}
#endif

// Calls body(local number, position, which) for the local ids of [begin, end), in order; `which`
// goes round from 0 to 3, so that neighbours differ in it.
template <class I, class F>
PPMOE_INLINE void for_each_local(const Index& a, int64_t begin, int64_t end, const F& body) {
  const I* ids = static_cast<const I*>(a.experts);
  // No id lies beyond int32, and an id below the first, wrapped around, is past that end.
  const int64_t most = (int64_t{1} << 31) - a.first;
  const uint32_t local = static_cast<uint32_t>(sizeof(I) == 8 || a.local < most ? a.local : most);
  int64_t i = begin;
#if defined(__AVX512F__)
  for (; i + kLanes <= end; i += kLanes) {
    const int32_t base = static_cast<int32_t>(i);
    const __m512i numbers = reinterpret_cast<__m512i>(local_numbers(ids + i, a.first));
    const __mmask16 mask =
        _mm512_cmplt_epu32_mask(numbers, _mm512_set1_epi32(static_cast<int>(local)));
    if (mask == 0xffff) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) body(local_number(ids[i + j], a.first), base + j, j % 4);
      continue;
    }
    alignas(64) uint32_t number[kLanes];
    alignas(64) int32_t position[kLanes];
    const __m512i positions = reinterpret_cast<__m512i>(lane_numbers() + base);
    store(number, _mm512_maskz_compress_epi32(mask, numbers));
    store(position, _mm512_maskz_compress_epi32(mask, positions));
    for (int j = 0; j < __builtin_popcount(mask); ++j) body(number[j], position[j], j % 4);
  }
#endif
  for (; i < end; ++i) {
    const uint32_t number = local_number(ids[i], a.first);
    if (number < local) body(number, static_cast<int32_t>(i), static_cast<int>(i % 4));
  }
}

constexpr int64_t kLine = static_cast<int64_t>(sizeof(Line) / sizeof(int32_t));

// Writes what the line of `stream` holds up to its next slot, and not what lies before its first.
PPMOE_INLINE void flush_line(const Stream& stream, const Line& line) {
  int32_t* to = stream.next - 1 - (reinterpret_cast<uintptr_t>(stream.next - 1) / 4) % kLine;
  if (stream.next - to == kLine && to >= stream.first) {
    __builtin_memcpy(to, line.slots, sizeof(line));
    return;
  }
  for (int64_t i = 0; to + i < stream.next; ++i) {
    if (to + i >= stream.first) to[i] = line.slots[i];
  }
}

template <class I>
void count_ids(const Index& a, int64_t begin, int64_t end, int32_t* counts) {
  const int64_t table = a.local;
  // Neighbours count into tables of their own, so that equal ids in a row do not wait.
  for_each_local<I>(a, begin, end,
                    [&](uint32_t number, int32_t, int which)
                        __attribute__((always_inline)) { ++counts[which * table + number]; });
}

template <class I>
void place_ids(const Index& a, int64_t begin, int64_t end, Stream* streams) {
  for_each_local<I>(a, begin, end,
                    [&](uint32_t number, int32_t position, int) __attribute__((always_inline)) {
                      int32_t* to = streams[number].next;
                      *to = position;
                      streams[number].next = to + 1;
                    });
}

PPMOE_INLINE int64_t place_in_line(const int32_t* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(int32_t) % kLine);
}

// The same, with a stream's current cache line kept beside the others' and written out when full.
template <class I>
void place_ids_by_line(const Index& a, int64_t begin, int64_t end, Stream* streams, Line* lines) {
  for_each_local<I>(a, begin, end,
                    [&](uint32_t number, int32_t position, int) __attribute__((always_inline)) {
                      Stream& stream = streams[number];
                      int32_t* to = stream.next;
                      const int64_t place = place_in_line(to);
                      lines[number].slots[place] = position;
                      stream.next = to + 1;
                      if (place == kLine - 1) flush_line(stream, lines[number]);
                    });
  for (int64_t e = 0; e < a.local; ++e) flush_line(streams[e], lines[e]);
}

// Whether the streams begin in so few cache sets that they would drive each other out of the first
// level: equally many slots an expert put them a round number of bytes apart.
bool crowded(const Index& a, const Stream* streams) {
  constexpr int kSets = 64, kMost = 16;
  uint16_t streams_of[kSets] = {};
  for (int64_t e = 0; e < a.local; ++e) {
    const uintptr_t set = reinterpret_cast<uintptr_t>(streams[e].next) / 64 % kSets;
    if (++streams_of[set] > kMost) return true;
  }
  return false;
}

}  // namespace

void count(const Index& a, int64_t begin, int64_t end, int32_t* counts) {
  a.wide ? count_ids<int64_t>(a, begin, end, counts) : count_ids<int32_t>(a, begin, end, counts);
}

void place(const Index& a, int64_t begin, int64_t end, Stream* streams, Line* lines) {
  if (!crowded(a, streams)) {
    a.wide ? place_ids<int64_t>(a, begin, end, streams)
           : place_ids<int32_t>(a, begin, end, streams);
  } else if (a.wide) {
    place_ids_by_line<int64_t>(a, begin, end, streams, lines);
  } else {
    place_ids_by_line<int32_t>(a, begin, end, streams, lines);
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
