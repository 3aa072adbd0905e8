// The phases of ladder_block: what its kernels take, from tensors that have been checked.
#pragma once

#include "cpu/ladder_attention/fusion_kernels.h"
#include "cpu/ladder_attention/ops.h"

namespace ppmoe::ladder_attention {

// Places in `params`: three branches, and then the six tensors of the fusion.
enum BlockPart {
  kLn1W,
  kLn1B,
  kWIn,
  kBIn,
  kTable,
  kWOut,
  kBOut,
  kLn2W,
  kLn2B,
  kF1W,
  kF1B,
  kDwW,
  kDwB,
  kDwOff,
  kF2W,
  kF2B,
  kBlockParts,
};
constexpr int64_t kBranches = 3;
constexpr int64_t kBlockFusion = kBranches * kBlockParts, kBlockTensors = kBlockFusion + 6;

// The parameters of a branch as the kernels take them.
struct BlockBranch {
  Packing w_in, w_out;
  Bytes ln_w, ln_b, b_in, table, b_out, prepared;
  std::vector<Tensor> kept;
  Ffn ffn{};
  Cut rows, columns;

  BlockBranch(const Tensor* p, const Tensor& x, const Pair& window, const Pair& shift, int sign);
};

class Block {
 public:
  // Packs the parameters. The dtype of x is one that products need not widen.
  Block(const Tensor& x, const Tensor& out, const std::vector<Tensor>& params, int64_t num_heads,
        const Pair& window, const Pair& shift);

  // All images through one phase after another; the threads share every phase.
  void run_together() const;
  // `chunk` images at a time through all phases, on one thread: what lies between the phases stays
  // in its caches, and no thread waits for another. The results are the same.
  void run_apart(int64_t chunk) const;

 private:
  // What lies between the phases.
  struct Between {
    char *projected[kBranches], *normed[kBranches], *attended, *z, *a1, *y;
    int64_t bytes;
  };

  int64_t pixels() const { return height_ * width_; }
  int64_t in_stride(int64_t branch) const;
  // Multiply-adds of a pixel's linear layers.
  int64_t products() const { return 16 * g_ * g_ + c_ * (c_ + 2 * d_); }
  void pack(const Tensor* fusion);
  // For some images. `apart`: each branch has memory of its own for what its attention takes.
  // Without `base`, the bytes alone.
  Between between(int64_t images, bool apart, char* base) const;
  Map rows_map(char* data, int64_t stride, int64_t channel) const;
  Map images_of(const Map& map, int64_t image, int64_t channel) const;

  BranchIn in(int64_t branch, int64_t image, const Between&) const;
  Attention attention(int64_t branch, const Between&) const;
  BranchOut after(int64_t branch, int64_t image, const Between&) const;
  Ffn ffn(int64_t branch, int64_t images, const Between&) const;
  Fusion fusion(int64_t image, const Between&) const;
  int64_t scratch_bytes() const;

  template <class Run>
  void run(int64_t image, int64_t images, const Between&, const Run& run) const;

  int64_t heads_, images_, height_, width_, g_, c_, d_;
  DType dtype_;
  int64_t element_, g_stride_;  // bytes; elements
  Map x_, out_;
  std::vector<BlockBranch> branches_;
  Bytes fused_{nullptr, &std::free};
};

}  // namespace ppmoe::ladder_attention
