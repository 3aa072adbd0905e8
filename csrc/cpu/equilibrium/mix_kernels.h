// What the kernels of anderson_mix take: one sample's rows, and what was decided for it.
#pragma once

#include <cstdint>

#include "cpu/equilibrium/mixing.h"
#include "ppmoe/types.h"

namespace ppmoe::mix {

using equilibrium::kMostHistory;

// A task is a piece of so many elements of a sample; sums are taken piece by piece, in order.
constexpr int64_t kPiece = 8192;

// Sums over a sample: squares of g, f and z; the new difference dg with itself and with g; then,
// for each difference that is held, its products with the new one and with g.
enum Sum { kSquareG, kSquareF, kSquareZ, kSquareNew, kNewG, kHeld };
constexpr int kMostSums = kHeld + 2 * kMostHistory;

// A sample's rows. Those of the history are in the dtype that f is summed in.
struct Sample {
  DType dtype;
  int64_t width;
  const void* f;
  void *z, *z_next, *best_z, *best_f;
  void *dg, *df;           // [history + 1, width]; dg is null where the history is 0
  bool first;              // there is no step before
  bool stream;             // the history is larger than the caches
  int slot, next;          // the rows of the last step's g and f, and those that this step's go to
  int held;                // differences from before that may be used
  int rows[kMostHistory];  // where they are
};

// What the second pass does with it.
struct Choice {
  bool keep_old, keep_new;  // the point before this one, or this one, goes to best_z and best_f
  bool stop, put_back;      // the best point goes to z_next, and to z as well
  bool push;                // the new difference is used
  double weight;            // its weight, and those of the held ones
  int held;
  double weights[kMostHistory];
  double left;  // 1 - damping
};

struct Kernels {
  // Elements [begin, end): sums, and the rows of dg.
  void (*measure)(const Sample&, int64_t begin, int64_t end, double* sums);
  // The rows of df, z_next and what else the choice says.
  void (*mix)(const Sample&, const Choice&, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace ppmoe::mix
