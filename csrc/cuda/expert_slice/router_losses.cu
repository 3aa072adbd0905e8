// router_losses on CUDA, in two launches: blocks of rows leave partial sums (softmax mass and hits
// of every expert, squares of the log-sum-exp), and one block adds them up in the order of the
// rows. Which rows make a block depends on T alone, and nothing is added atomically but integers,
// so that results have the same bits on every run and every GPU.

#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>

#include "route_keys.cuh"
#include "routing.cuh"

namespace ppmoe {
namespace {

constexpr const char* kOp = "router_losses";
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockRows = 64;        // fewest rows of a block
constexpr int64_t kMostBlocks = 256;  // so that one block adds the partial sums soon
constexpr int kHits = 1024;           // experts that are counted at a time
constexpr int kFinishThreads = 1024;

template <class T>
struct Losses {
  using W = Accumulator<T>;
  const T* logits;  // [T, E]
  int64_t stride;
  const void* ids;  // [T, K], int32 or int64
  bool wide_ids;
  W* lse;           // [T]
  W* mass;          // [blocks, E]
  int* hits;        // [blocks, E]
  double* squares;  // [blocks]
  int64_t tokens;
  int64_t rows;  // of a block
  int experts;
  int64_t top_k;
};

// hits[block][e]: how many ids of the block's rows are e.
template <class T>
__device__ void count_hits(const Losses<T>& a, int64_t begin, int64_t end, int* histogram) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int low = 0; low < a.experts; low += kHits) {
    const int width = min(kHits, a.experts - low);
    for (int e = thread; e < width; e += kThreads) histogram[e] = 0;
    __syncthreads();
    for (int64_t i = begin * a.top_k + thread; i < end * a.top_k; i += kThreads) {
      const int64_t id =
          a.wide_ids ? static_cast<const int64_t*>(a.ids)[i] : static_cast<const int*>(a.ids)[i];
      const uint64_t e = static_cast<uint64_t>(id) - static_cast<uint64_t>(low);
      if (e < static_cast<uint64_t>(width)) atomicAdd(&histogram[e], 1);
    }
    __syncthreads();
    int* row = a.hits + static_cast<int64_t>(blockIdx.x) * a.experts + low;
    for (int e = thread; e < width; e += kThreads) row[e] = histogram[e];
  }
}

// Fewest bytes: T*E logits and T*K ids read, T log-sum-exps written. The logits of a block are read
// again from the cache, for their sum and when the mass of kWide experts at a time is added up.
template <class T, int kStep>
__global__ void __launch_bounds__(kThreads, 1) losses_kernel(const Losses<T> a) {
  using W = Accumulator<T>;
  using V = Vec<T, kStep>;
  constexpr int kMass = 64 / static_cast<int>(sizeof(W));  // experts of a lane
  constexpr int kVectors = kStep == 1 ? kMass / 2 : kMass / kStep;
  constexpr int kWide = 32 * kStep * kVectors;
  __shared__ int histogram[kHits];
  __shared__ W partial[kWarps][kWide];
  __shared__ double squares[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.rows;
  const int64_t end = min(begin + a.rows, a.tokens);
  count_hits(a, begin, end, histogram);

  const auto top_of = [&](const T* row) {
    W top = -infinity<W>();
#pragma unroll 1
    for (int e = lane * kStep; e < a.experts; e += 32 * kStep) {
      const V x = load<V>(row + e);
#pragma unroll
      for (int i = 0; i < kStep; ++i) top = larger(top, widen(x.lane[i]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      top = larger(top, __shfl_xor_sync(kEveryLane, top, step));
    }
    return top;
  };
  const auto total_of = [&](const T* row, W top, bool& nan) {
    W total = 0;
#pragma unroll 1
    for (int e = lane * kStep; e < a.experts; e += 32 * kStep) {
      const V x = load<V>(row + e);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const W value = widen(x.lane[i]);
        nan = nan || value != value;
        total += exponential(value - top);
      }
    }
    return warp_sum(total);
  };

  double square = 0;
  for (int first = 0; first < a.experts; first += kWide) {
    W mass[kVectors][kStep] = {};
    for (int64_t t = begin + warp; t < end; t += kWarps) {
      const T* row = a.logits + t * a.stride;
      const W top = top_of(row);
      bool nan = false;
      const W total = total_of(row, top, nan);
      const W inverse = reciprocal(total);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int e = first + (32 * v + lane) * kStep;
        if (e >= a.experts) continue;
        const V x = load<V>(row + e);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          mass[v][i] += exponential(widen(x.lane[i]) - top) * inverse;
        }
      }
      if (first > 0) continue;
      W lse = top + logarithm(total);
      // An infinite largest logit is the log-sum-exp itself, unless there is a NaN beside it.
      const bool any_nan = __any_sync(kEveryLane, nan);
      if (top - top != 0 && !any_nan) lse = top;
      if (lane == 0) a.lse[t] = lse;
      square += static_cast<double>(lse) * static_cast<double>(lse);
    }
    __syncthreads();  // the sums of the experts before have been read
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) partial[warp][(32 * v + lane) * kStep + i] = mass[v][i];
    }
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    for (int e = thread; e < min(kWide, a.experts - first); e += kThreads) {
      W sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][e];
      a.mass[static_cast<int64_t>(blockIdx.x) * a.experts + first + e] = sum;
    }
  }
  if (thread == 0) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += squares[w];
    a.squares[blockIdx.x] = sum;
  }
}

// The sum over the block, for every thread; in an order that does not change.
template <class W>
__device__ W block_sum(W value, W* shared) {
  value = warp_sum(value);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  W sum = 0;
  for (int w = 0; w < kFinishThreads / 32; ++w) sum += shared[w];
  return sum;
}

// The partial sums of 32 * kColumns experts at a time: every warp takes some of the blocks, a lane
// kColumns experts of them, so that its loads are coalesced and in flight together.
// Fewest bytes: the partial sums read, E shares written.
template <class W>
__global__ void __launch_bounds__(kFinishThreads)
    finish_losses_kernel(const W* __restrict__ mass, const int* __restrict__ hits,
                         const double* __restrict__ squares, int64_t* __restrict__ totals,
                         int blocks, int64_t tokens, int experts, W* __restrict__ balance,
                         W* __restrict__ z, W* __restrict__ shares) {
  constexpr int kParts = kFinishThreads / 32;
  constexpr int kColumns = 4;
  constexpr int kWide = 32 * kColumns;
  __shared__ double some_mass[kParts][kWide + 1];
  __shared__ double shared[kParts];
  __shared__ int64_t shared_hits[kParts];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  double product = 0;  // of hits and mass, over the experts of this thread
  int64_t valid = 0;
  for (int first = 0; first < experts; first += kWide) {
    double own_mass[kColumns] = {};
    int64_t own_hits[kColumns] = {};
#pragma unroll 2
    for (int b = warp; b < blocks; b += kParts) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int e = first + 32 * c + lane;
        if (e >= experts) continue;
        own_mass[c] += mass[static_cast<int64_t>(b) * experts + e];
        own_hits[c] += hits[static_cast<int64_t>(b) * experts + e];
      }
    }
    // A warp adds the parts of an expert, a lane each; hits through the same memory, as they are
    // exact in a double.
    double all_mass[kColumns];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) some_mass[warp][32 * c + lane] = own_mass[c];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) all_mass[c] = warp_sum(some_mass[lane][32 * c + warp]);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      some_mass[warp][32 * c + lane] = static_cast<double>(own_hits[c]);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int e = first + 32 * c + warp;
      const double all_hits = warp_sum(some_mass[lane][32 * c + warp]);
      if (lane == 0 && e < experts) {
        product += all_hits * all_mass[c];
        valid += static_cast<int64_t>(all_hits);
        totals[e] = static_cast<int64_t>(all_hits);
      }
    }
  }
  double square = 0;
  for (int b = thread; b < blocks; b += kFinishThreads) square += squares[b];
  product = block_sum(product, shared);
  square = block_sum(square, shared);
  valid = block_sum(valid, shared_hits);
  const double choices = static_cast<double>(valid > 0 ? valid : 1);
  const double rows = static_cast<double>(tokens > 0 ? tokens : 1);
  if (thread == 0) {
    *balance = static_cast<W>(experts * (product / choices / rows));
    *z = static_cast<W>(square / rows);
  }
  for (int e = thread; e < experts; e += kFinishThreads) {
    shares[e] = static_cast<W>(static_cast<double>(totals[e]) / choices);
  }
}

template <class T>
void launch_losses(const Tensor& logits, const Tensor& ids, const Tensor& balance, const Tensor& z,
                   const Tensor& shares, const Tensor& lse, cudaStream_t stream) {
  using W = Accumulator<T>;
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const int64_t rows = std::max<int64_t>(kBlockRows, (tokens + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (tokens + rows - 1) / rows;
  const Tensor mass = empty_like_device<1>(logits, {blocks * experts}, balance.scalar_type());
  const Tensor hits = empty_like_device<1>(logits, {blocks * experts}, ScalarType::Int);
  const Tensor squares = empty_like_device<1>(logits, {blocks}, ScalarType::Double);
  const Tensor totals = empty_like_device<1>(logits, {experts}, ScalarType::Long);
  const Losses<T> args{static_cast<const T*>(logits.const_data_ptr()),
                       logits.stride(0),
                       ids.const_data_ptr(),
                       ids.scalar_type() == ScalarType::Long,
                       static_cast<W*>(lse.mutable_data_ptr()),
                       static_cast<W*>(mass.mutable_data_ptr()),
                       static_cast<int*>(hits.mutable_data_ptr()),
                       static_cast<double*>(squares.mutable_data_ptr()),
                       tokens,
                       rows,
                       static_cast<int>(experts),
                       ids.size(1)};
  if (blocks > 0) {
    const auto grid = static_cast<unsigned>(blocks);
    constexpr int kStep = kVectorBytes / static_cast<int>(sizeof(T));
    if (aligned(logits, kVectorBytes)) {
      losses_kernel<T, kStep><<<grid, kThreads, 0, stream>>>(args);
    } else {
      losses_kernel<T, 1><<<grid, kThreads, 0, stream>>>(args);
    }
    check_launch(kOp, "losses_kernel");
  }
  finish_losses_kernel<W><<<1, kFinishThreads, 0, stream>>>(
      args.mass, args.hits, args.squares, static_cast<int64_t*>(totals.mutable_data_ptr()),
      static_cast<int>(blocks), tokens, args.experts, static_cast<W*>(balance.mutable_data_ptr()),
      static_cast<W*>(z.mutable_data_ptr()), static_cast<W*>(shares.mutable_data_ptr()));
  check_launch(kOp, "finish_losses_kernel");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses_forward(const Tensor& logits,
                                                                 const Tensor& experts) {
  check_dim(kOp, "logits", logits, "T, E");
  check_dtype(kOp, "logits", logits, kFloats);
  check_between(kOp, "E", logits.size(1), 1, INT_MAX, "axis 1 of logits");
  check_dim(kOp, "experts", experts, "T, K");
  check_dtype(kOp, "experts", experts, kIds);
  check_size(kOp, "experts", "T", experts.size(0), logits.size(0), "as logits");
  check_device(kOp, "experts", experts, logits);

  const ScalarType wide = wide_dtype(logits.scalar_type());
  const Tensor balance = empty_like_device<0>(logits, {}, wide);
  const Tensor z = empty_like_device<0>(logits, {}, wide);
  const Tensor shares = empty_like_device<1>(logits, {logits.size(1)}, wide);
  const Tensor lse = empty_like_device<1>(logits, {logits.size(0)}, wide);
  const LaunchScope scope(kOp, logits);
  const Tensor rows = with_dense_rows(logits);
  const Tensor ids = as_contiguous(experts);
  by_dtype(rows.scalar_type(), [&]<class T>() {
    launch_losses<T>(rows, ids, balance, z, shares, lse, scope.stream());
  });
  return {balance, z, shares, lse};
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) {
  m.impl("router_losses_forward", TORCH_BOX(&router_losses_forward));
}

}  // namespace
}  // namespace ppmoe
