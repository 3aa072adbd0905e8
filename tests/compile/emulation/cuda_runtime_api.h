// Enough of CUDA on a CPU to run the package's kernels from their own source: found before the real
// headers on the include path. Every thread of a block is a fiber; a barrier or a warp collective
// suspends it until the others of its group have arrived. Which warp runs next, and the order of
// its lanes, is random, so that a missing barrier shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

namespace emulation {

// Threads that wait for one another: a warp or a block.
struct Group {
  int members = 0;
  int arrived = 0;
  uint64_t round = 0;
  int64_t mail[32] = {};

  void release_if_complete() {
    if (members > 0 && arrived == members) {
      arrived = 0;
      ++round;
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int lane = 0;
  Group* warp = nullptr;
  Group* awaited = nullptr;
  uint64_t round = 0;
  bool done = false;

  bool runnable() const { return !done && (awaited == nullptr || awaited->round != round); }
};

struct Machine {
  dim3 grid_dim, block_dim, block;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  Group whole;
  std::function<void()> body;
  std::vector<float> dynamic_shared;
  std::mt19937 random{1};
  cudaError_t error = cudaSuccess;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine().dynamic_shared.data());
}

inline void wait(Group& group) {
  Fiber& fiber = *machine().running;
  fiber.awaited = &group;
  fiber.round = group.round;
  ++group.arrived;
  group.release_if_complete();
  swapcontext(&fiber.context, &machine().scheduler);
}

inline void enter() {
  Machine& m = machine();
  m.body();
  Fiber& fiber = *m.running;
  fiber.done = true;
  for (Group* group : {fiber.warp, &m.whole}) {
    --group->members;
    group->release_if_complete();
  }
  swapcontext(&fiber.context, &m.scheduler);
}

// The first warp from a random one on that can run.
inline size_t pick_warp(const std::vector<Fiber>& fibers, size_t warps) {
  const size_t start = machine().random() % warps;
  for (size_t step = 0; step < warps; ++step) {
    const size_t warp = (start + step) % warps;
    const size_t end = std::min(fibers.size(), 32 * warp + 32);
    for (size_t i = 32 * warp; i < end; ++i) {
      if (fibers[i].runnable()) return warp;
    }
  }
  throw std::logic_error("emulation: every thread waits at a barrier that others never reach");
}

inline void run_block() {
  Machine& m = machine();
  constexpr size_t kStack = 64 * 1024;
  const size_t threads = size_t{m.block_dim.x} * m.block_dim.y * m.block_dim.z;
  std::vector<Fiber> fibers(threads);
  std::vector<Group> warps((threads + 31) / 32);
  m.whole = Group{};
  m.whole.members = static_cast<int>(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    fiber.thread = dim3(static_cast<unsigned>(i % m.block_dim.x),
                        static_cast<unsigned>(i / m.block_dim.x % m.block_dim.y));
    fiber.lane = static_cast<int>(i % 32);
    fiber.warp = &warps[i / 32];
    ++fiber.warp->members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t left = threads; left > 0;) {
    const size_t warp = pick_warp(fibers, warps.size());
    std::vector<Fiber*> lanes;
    for (size_t i = 32 * warp; i < std::min(threads, 32 * warp + 32); ++i) {
      if (fibers[i].runnable()) lanes.push_back(&fibers[i]);
    }
    std::shuffle(lanes.begin(), lanes.end(), m.random);
    for (Fiber* fiber : lanes) {
      m.running = fiber;
      swapcontext(&m.scheduler, &fiber->context);
      left -= fiber->done;
    }
  }
}

template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  return [=](Parameters... args) {
    Machine& m = machine();
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || threads == 0 || threads > 1024 || grid.y > 65535 ||
        shared > 48 * 1024) {
      m.error = cudaErrorInvalidConfiguration;
      return;
    }
    m.grid_dim = grid;
    m.block_dim = block;
    m.body = [=] { kernel(args...); };
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), m.random);
    for (uint64_t i : order) {
      m.block = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x));
      m.dynamic_shared.assign(shared / sizeof(float), NAN);
      run_block();
    }
  };
}

// Every lane posts a value and reads those of the others; the second wait keeps the mail until
// then.
template <class Read>
auto exchange(int64_t value, Read read) {
  Fiber& fiber = *machine().running;
  fiber.warp->mail[fiber.lane] = value;
  wait(*fiber.warp);
  auto result = read(fiber.warp->mail, fiber.lane);
  wait(*fiber.warp);
  return result;
}

template <class T>
T shuffle(T value, const std::function<int(int)>& source) {
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int64_t got =
      exchange(bits, [&](const int64_t* mail, int lane) { return mail[source(lane)]; });
  T result;
  std::memcpy(&result, &got, sizeof(T));
  return result;
}

}  // namespace emulation

#define threadIdx (emulation::machine().running->thread)
#define blockIdx (emulation::machine().block)
#define blockDim (emulation::machine().block_dim)
#define gridDim (emulation::machine().grid_dim)

inline void __syncthreads() { emulation::wait(emulation::machine().whole); }
inline void __syncwarp() { emulation::wait(*emulation::machine().running->warp); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __match_any_sync(unsigned, int value) {
  return emulation::exchange(value, [](const int64_t* mail, int lane) {
    unsigned peers = 0;
    for (int i = 0; i < 32; ++i) peers |= unsigned{mail[i] == mail[lane]} << i;
    return peers;
  });
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulation::exchange(vote, [](const int64_t* mail, int) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned{mail[i] != 0} << i;
    return votes;
  });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulation::exchange(value, [](const int64_t* mail, int) {
    return static_cast<unsigned>(*std::max_element(mail, mail + 32));
  });
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::shuffle(value, [=](int) { return from; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  return emulation::shuffle(value, [=](int lane) { return lane >= step ? lane - step : lane; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::shuffle(value, [=](int lane) { return lane ^ step; });
}

inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline int atomicMax(int* at, int value) { return std::exchange(*at, std::max(*at, value)); }

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::machine().error, cudaSuccess);
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t size, cudaStream_t) {
  std::memset(to, byte, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
