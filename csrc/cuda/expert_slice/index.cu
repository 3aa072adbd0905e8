// expert_index on CUDA: a stable counting sort of the flat slots by local expert.
//
// Two launches at any size: one counts ids by block and expert, the other turns the counts into
// positions and writes the slots. Up to kAloneSlots a single block does both in one launch, since a
// launch costs more than the work. Every block sums the count matrix for itself, which is a few KB
// from L2 and saves a scan launch. Only integers are added, so every order gives the same result.
//
// Fewest bytes: T*K ids read, T*K + L + 1 int32 written.

#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>

#include "ppmoe/launch.h"

namespace ppmoe {
namespace {

constexpr const char* kOp = "expert_index";
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRounds = 4;               // ids that a lane loads before it ranks them
constexpr int kColumns = 4;              // experts whose counts a lane sums at once
constexpr int kSlice = 512;              // experts that a block keeps in shared memory
constexpr int kAloneSlots = 4096;        // above this, more than one block pays
constexpr int kChunk = 1024;             // fewest ids a block gets when there are several
constexpr int kMaxBlocks = 256;          // bounds the rows of the count matrix
constexpr int64_t kMaxCounts = 1 << 24;  // and its elements

struct Ids {
  int count;      // T * K
  int chunk;      // ids of a block, a multiple of kThreads
  int64_t first;  // first local expert
  int num_local;
};

// Position of `id` among the `width` experts from `low` on, or `width` where it is none of them.
template <class Id>
__device__ __forceinline__ int place_of(Id id, int64_t low, int width) {
  const uint64_t e = static_cast<uint64_t>(static_cast<int64_t>(id)) - static_cast<uint64_t>(low);
  return e < static_cast<uint64_t>(width) ? static_cast<int>(e) : width;
}

// counts[block][expert]; blockIdx.y is the slice of experts.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    count_ids_kernel(const Id* __restrict__ ids, Ids args, int* __restrict__ counts) {
  __shared__ int histogram[kSlice];
  const int low = static_cast<int>(blockIdx.y) * kSlice;
  const int width = min(kSlice, args.num_local - low);
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < width; e += kThreads) histogram[e] = 0;
  __syncthreads();

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * args.chunk;
  const int64_t end = min(begin + args.chunk, static_cast<int64_t>(args.count));
  for (int64_t i = begin + thread; i < end; i += kThreads) {
    const int e = place_of(ids[i], args.first + low, width);
    if (e < width) atomicAdd(&histogram[e], 1);
  }
  __syncthreads();

  int* row = counts + static_cast<int64_t>(blockIdx.x) * args.num_local + low;
  for (int e = thread; e < width; e += kThreads) row[e] = histogram[e];
}

struct Shared {
  int cursor[kWarps][kSlice];  // partial totals, then counts of a warp, then its write positions
  int ahead[kWarps][kSlice];   // partial counts of the blocks before this one
  int total[kSlice];
  int start[kSlice];  // first position of this block's slots of an expert
  int below;          // slots of the experts under this slice
  int local;          // slots up to the end of this slice
};

// Sums the count matrix into total[e] (all blocks) and start[e] (blocks before this one). A warp
// takes every kWarps-th row and a lane kColumns experts of it, so that its loads are coalesced and
// all in flight together: this wait is the longest of the launch. The caller synchronises before it
// reads the sums.
__device__ void sum_counts(const int* __restrict__ counts, const Ids& args, int low, int width,
                           Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  for (int first = thread % 32; first < width; first += 32 * kColumns) {
    int total[kColumns] = {};
    int ahead[kColumns] = {};
#pragma unroll 8
    for (int b = warp; b < blocks; b += kWarps) {
      const int* row = counts + static_cast<int64_t>(b) * args.num_local + low;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int e = first + 32 * c;
        const int count = e < width ? row[e] : 0;
        total[c] += count;
        ahead[c] += b < block ? count : 0;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int e = first + 32 * c;
      if (e >= width) continue;
      shared.cursor[warp][e] = total[c];
      shared.ahead[warp][e] = ahead[c];
    }
  }
  if (low > 0) {
    int below = 0;
    for (int b = warp; b < blocks; b += kWarps) {
      const int* row = counts + static_cast<int64_t>(b) * args.num_local;
      for (int e = thread % 32; e < low; e += 32) below += row[e];
    }
    atomicAdd(&shared.below, below);
  }
  __syncthreads();
  for (int e = thread; e < width; e += kThreads) {
    int total = 0;
    int ahead = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += shared.cursor[w][e];
      ahead += shared.ahead[w][e];
    }
    shared.total[e] = total;
    shared.start[e] = ahead;
  }
}

// Adds to start[e] the slots of all experts before e; one warp, 32 experts at a time.
__device__ void scan_totals(const Ids& args, int low, int width, int* __restrict__ offsets,
                            Shared& shared) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int carry = shared.below;
    for (int first = 0; first < width; first += 32) {
      const int e = first + lane;
      const int own = e < width ? shared.total[e] : 0;
      int sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += left;
      }
      const int offset = carry + sum - own;
      if (e < width) {
        shared.start[e] += offset;
        if (blockIdx.x == 0) offsets[low + e] = offset;
      }
      carry += __shfl_sync(kAllLanes, sum, 31);
    }
    if (lane == 0) {
      shared.local = carry;
      if (blockIdx.x == 0 && low + width == args.num_local) offsets[args.num_local] = carry;
    }
  }
  __syncthreads();
}

// A warp owns a contiguous piece of the chunk and ranks its ids in order: among the lanes with the
// same expert by lane, before them whatever its cursor has passed. That makes the sort stable.
template <class Id>
__device__ void write_slots(const Id* __restrict__ ids, const Ids& args, int64_t begin, int64_t end,
                            int low, int width, int* __restrict__ slots, int* cursor) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t tile = begin; tile < end; tile += 32 * kRounds) {
    int expert[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = tile + 32 * r + lane;
      expert[r] = i < end ? place_of(ids[i], args.first + low, width) : width;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const unsigned peers = __match_any_sync(kAllLanes, expert[r]);
      const int rank = __popc(peers & ((1u << lane) - 1));
      const bool ours = expert[r] < width;
      if (ours) slots[cursor[expert[r]] + rank] = static_cast<int>(tile + 32 * r + lane);
      __syncwarp();
      if (ours && rank == 0) cursor[expert[r]] += __popc(peers);
      __syncwarp();
    }
  }
}

// kAlone: a grid of one block, which needs no count matrix.
template <class Id, bool kAlone>
__global__ void __launch_bounds__(kThreads)
    place_slots_kernel(const Id* __restrict__ ids, Ids args, const int* __restrict__ counts,
                       int* __restrict__ slots, int* __restrict__ offsets) {
  __shared__ Shared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int low = static_cast<int>(blockIdx.y) * kSlice;
  const int width = min(kSlice, args.num_local - low);
  if (thread == 0) shared.below = 0;
  __syncthreads();
  if constexpr (!kAlone) sum_counts(counts, args, low, width, shared);

  for (int e = thread; e < width; e += kThreads) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) shared.cursor[w][e] = 0;
  }
  __syncthreads();
  const int piece = args.chunk / kWarps;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * args.chunk + warp * piece;
  const int64_t end = min(begin + piece, static_cast<int64_t>(args.count));
  for (int64_t i = begin + thread % 32; i < end; i += 32) {
    const int e = place_of(ids[i], args.first + low, width);
    if (e < width) atomicAdd(&shared.cursor[warp][e], 1);
  }
  __syncthreads();
  if constexpr (kAlone) {
    for (int e = thread; e < width; e += kThreads) {
      int total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.cursor[w][e];
      shared.total[e] = total;
      shared.start[e] = 0;
    }
    __syncthreads();
  }
  scan_totals(args, low, width, offsets, shared);

  for (int e = thread; e < width; e += kThreads) {
    int position = shared.start[e];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int count = shared.cursor[w][e];
      shared.cursor[w][e] = position;
      position += count;
    }
  }
  __syncthreads();
  write_slots(ids, args, begin, end, low, width, slots, shared.cursor[warp]);

  if (low + width == args.num_local) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t i = shared.local + static_cast<int64_t>(blockIdx.x) * kThreads + thread;
    for (; i < args.count; i += stride) slots[i] = -1;
  }
}

template <class Id>
void launch(const Tensor& experts, Ids args, const Tensor& slots, const Tensor& offsets) {
  const LaunchScope scope(kOp, experts);
  const auto* ids = static_cast<const Id*>(experts.const_data_ptr());
  auto* slots_out = static_cast<int*>(slots.mutable_data_ptr());
  auto* offsets_out = static_cast<int*>(offsets.mutable_data_ptr());

  if (args.count <= kAloneSlots && args.num_local <= kSlice) {
    args.chunk = kThreads * std::max(1, (args.count + kThreads - 1) / kThreads);
    place_slots_kernel<Id, true>
        <<<1, kThreads, 0, scope.stream()>>>(ids, args, nullptr, slots_out, offsets_out);
    check_launch(kOp, "place_slots_kernel");
    return;
  }

  const int64_t most = std::clamp<int64_t>(kMaxCounts / std::max(args.num_local, 1), 1, kMaxBlocks);
  int64_t chunk = std::max<int64_t>(kChunk, (args.count + most - 1) / most);
  chunk = (chunk + kThreads - 1) / kThreads * kThreads;
  args.chunk = static_cast<int>(std::min<int64_t>(chunk, INT_MAX / kThreads * kThreads));
  const auto blocks = static_cast<unsigned>(
      std::max<int64_t>(1, (static_cast<int64_t>(args.count) + args.chunk - 1) / args.chunk));
  const auto slices = static_cast<unsigned>(
      std::max<int64_t>(1, (static_cast<int64_t>(args.num_local) + kSlice - 1) / kSlice));
  const Tensor counts = empty_like_device<1>(
      experts, {static_cast<int64_t>(blocks) * args.num_local}, ScalarType::Int);
  auto* matrix = static_cast<int*>(counts.mutable_data_ptr());
  const dim3 grid(blocks, slices);
  count_ids_kernel<Id><<<grid, kThreads, 0, scope.stream()>>>(ids, args, matrix);
  check_launch(kOp, "count_ids_kernel");
  place_slots_kernel<Id, false>
      <<<grid, kThreads, 0, scope.stream()>>>(ids, args, matrix, slots_out, offsets_out);
  check_launch(kOp, "place_slots_kernel");
}

std::tuple<Tensor, Tensor> expert_index(const Tensor& experts, int64_t first_expert,
                                        int64_t num_local) {
  check_dim(kOp, "experts", experts, "T, K");
  check_dtype(kOp, "experts", experts, kIds);
  check_between(kOp, "first_expert", first_expert, 0, INT_MAX);
  check_between(kOp, "num_local", num_local, 0, INT_MAX - 1);
  const int64_t count = experts.numel();
  check_between(kOp, "T*K", count, 0, INT_MAX, "slots are int32");

  const Tensor slots = empty_like_device<1>(experts, {count}, ScalarType::Int);
  const Tensor offsets = empty_like_device<1>(experts, {num_local + 1}, ScalarType::Int);
  const Tensor ids = as_contiguous(experts);
  const Ids args{static_cast<int>(count), 0, first_expert, static_cast<int>(num_local)};
  if (experts.scalar_type() == ScalarType::Int) {
    launch<int32_t>(ids, args, slots, offsets);
  } else {
    launch<int64_t>(ids, args, slots, offsets);
  }
  return {slots, offsets};
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) { m.impl("expert_index", TORCH_BOX(&expert_index)); }

}  // namespace
}  // namespace ppmoe
