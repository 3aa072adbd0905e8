// expert_index: a stable counting sort of the local slots by expert.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

template <class I>
struct Unsigned;
template <>
struct Unsigned<int32_t> {
  using type = uint32_t;
};
template <>
struct Unsigned<int64_t> {
  using type = uint64_t;
};

// The local number of an id, or `local` for every id that is not: its distance from `first` wraps
// around to a large number where it is below.
template <class I>
PPMOE_INLINE uint32_t bucket(I id, int64_t first, int64_t local) {
  using U = typename Unsigned<I>::type;
  const U distance = static_cast<U>(id) - static_cast<U>(first);
  return static_cast<uint32_t>(distance < static_cast<U>(local) ? distance : local);
}

template <class I>
void count_ids(const Index& a, int64_t begin, int64_t end, int32_t* counts) {
  const I* ids = static_cast<const I*>(a.experts);
  const int64_t first = a.first, local = a.local, table = local + 1;
  int64_t i = begin;
  // Neighbours count into tables of their own, so that equal ids in a row do not wait.
  for (; i + 4 <= end; i += 4) {
    ++counts[bucket(ids[i], first, local)];
    ++counts[table + bucket(ids[i + 1], first, local)];
    ++counts[2 * table + bucket(ids[i + 2], first, local)];
    ++counts[3 * table + bucket(ids[i + 3], first, local)];
  }
  for (; i < end; ++i) ++counts[bucket(ids[i], first, local)];
}

template <class I>
void place_ids(const Index& a, int64_t begin, int64_t end, int32_t* next) {
  const I* ids = static_cast<const I*>(a.experts);
  const int64_t first = a.first, local = a.local;
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t b = bucket(ids[i], first, local);
    if (b < local) a.slots[next[b]++] = static_cast<int32_t>(i);
  }
}

}  // namespace

void count(const Index& a, int64_t begin, int64_t end, int32_t* counts) {
  a.wide ? count_ids<int64_t>(a, begin, end, counts) : count_ids<int32_t>(a, begin, end, counts);
}

void place(const Index& a, int64_t begin, int64_t end, int32_t* next) {
  a.wide ? place_ids<int64_t>(a, begin, end, next) : place_ids<int32_t>(a, begin, end, next);
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
