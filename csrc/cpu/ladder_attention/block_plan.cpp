#include "cpu/ladder_attention/block_plan.h"

#include <algorithm>
#include <cmath>

#include "cpu/ladder_attention/attention_ops.h"
#include "cpu/ladder_attention/fusion_ops.h"

namespace ppmoe::ladder_attention {
namespace {

constexpr double kEps = 1e-5;

// How a phase's tasks are run: over the threads, or one after another on this one.
struct Threads {
  static constexpr bool kShared = true;
  template <class F>
  void operator()(int64_t tasks, int64_t products, int64_t bytes, const F& body) const {
    run_tasks(tasks, products, bytes, body);
  }
};
struct Alone {
  static constexpr bool kShared = false;
  char* scratch;
  template <class F>
  void operator()(int64_t tasks, int64_t, int64_t, const F& body) const {
    for (int64_t task = 0; task < tasks; ++task) body(task, scratch);
  }
};

}  // namespace

BlockBranch::BlockBranch(const Tensor* p, const Tensor& x, const Pair& window, const Pair& shift,
                         int sign)
    : w_in(p[kWIn]),
      w_out(p[kWOut]),
      ln_w(wide_vector(p[kLn1W], x.scalar_type())),
      ln_b(wide_vector(p[kLn1B], x.scalar_type())),
      b_in(wide_vector(p[kBIn], x.scalar_type())),
      table(turned_table(p[kTable], x.scalar_type())),
      b_out(wide_vector(p[kBOut], x.scalar_type())),
      prepared(nullptr, &std::free),
      rows(Cut::of(x.size(1), window[0], sign * shift[0])),
      columns(Cut::of(x.size(2), window[1], sign * shift[1])) {
  const auto parameter = [&](BlockPart part) {
    kept.push_back(closed(p[part]));
    return FfnParameter{kept.back().const_data_ptr(), kernel_dtype(p[part].scalar_type())};
  };
  const auto matrix = [&](BlockPart part) {
    return FfnMatrix{p[part].const_data_ptr(), p[part].stride(0), p[part].stride(1)};
  };
  ffn.dtype = kernel_dtype(x.scalar_type());
  ffn.height = x.size(1);
  ffn.width = x.size(2);
  ffn.channels = x.size(3) / kBranches;
  ffn.eps = kEps;
  ffn.ln_w = parameter(kLn2W);
  ffn.ln_b = parameter(kLn2B);
  ffn.w1 = matrix(kF1W);
  ffn.b1 = parameter(kF1B);
  ffn.dw_w = parameter(kDwW);
  ffn.dw_b = parameter(kDwB);
  ffn.dw_off = parameter(kDwOff);
  ffn.w2 = matrix(kF2W);
  ffn.b2 = parameter(kF2B);
  prepared = aligned_bytes(kernels().ffn.bytes(ffn.dtype, ffn.channels).prepared);
  ffn.prepared = prepared.get();
}

Block::Block(const Tensor& x, const Tensor& out, const std::vector<Tensor>& params,
             int64_t num_heads, const Pair& window, const Pair& shift)
    : heads_(num_heads),
      images_(x.size(0)),
      height_(x.size(1)),
      width_(x.size(2)),
      g_(x.size(3) / kBranches),
      c_(x.size(3)),
      d_(params[kBlockFusion].size(0)),
      dtype_(kernel_dtype(x.scalar_type())),
      element_(x.element_size()),
      g_stride_(kernels().attention.packed_stride(dtype_, g_)),
      x_(map_of(x)),
      out_(map_of(out)) {
  static constexpr int kSigns[kBranches] = {0, 1, -1};
  branches_.reserve(kBranches);
  for (int64_t i = 0; i < kBranches; ++i) {
    branches_.emplace_back(params.data() + i * kBlockParts, x, window, shift, kSigns[i]);
  }
  pack(params.data() + kBlockFusion);
}

// Everything in one go over the threads: feed-forward networks, the fusion, the projections.
void Block::pack(const Tensor* p) {
  const Tensor b1 = closed(p[1]), b2 = closed(p[3]), bp = closed(p[5]);
  FusionLayer layer{};
  layer.dtype = dtype_;
  layer.channels = c_;
  layer.width = d_;
  layer.w1 = matrix_of(p[0]);
  layer.b1 = b1.const_data_ptr();
  layer.w2 = matrix_of(p[2]);
  layer.b2 = b2.const_data_ptr();
  layer.wp = matrix_of(p[4]);
  layer.bp = bp.const_data_ptr();
  const FusionKernels& k = kernels().fusion;
  fused_ = aligned_bytes(k.fusion_bytes(layer));
  std::vector<const Packing*> packings;
  int64_t panels = 0;
  for (const BlockBranch& branch : branches_) {
    for (const Packing* each : {&branch.w_in, &branch.w_out}) {
      packings.push_back(each);
      panels += each->panels();
    }
  }
  const int64_t units = k.fusion_units(layer);
  // An element takes about as long as eight multiply-adds.
  run_tasks(kBranches + units + panels, 8 * products(), 0, [&](int64_t task, char*) {
    if (task < kBranches) return kernels().ffn.prepare(branches_[static_cast<size_t>(task)].ffn);
    task -= kBranches;
    if (task < units) return k.fusion_pack(layer, task, fused_.get());
    task -= units;
    for (const Packing* each : packings) {
      if (task < each->panels()) return each->pack(task);
      task -= each->panels();
    }
  });
}

int64_t Block::in_stride(int64_t branch) const {
  const Packing& w_in = branches_[static_cast<size_t>(branch)].w_in;
  return kernels().attention.packed_stride(dtype_, w_in.outputs());
}

Block::Between Block::between(int64_t images, bool apart, char* base) const {
  constexpr int64_t kSlack = 64 * 8;  // vectors are read past the end
  const int64_t rows = images * pixels();
  Between b{};
  const auto take = [&](int64_t bytes) {
    char* const at = base != nullptr ? base + b.bytes : nullptr;
    b.bytes += ceil_div(bytes + kSlack, 64) * 64;
    return at;
  };
  for (int64_t i = 0; i < kBranches; ++i) {
    const bool own = i == 0 || apart;
    b.projected[i] = own ? take(rows * in_stride(i) * element_) : b.projected[0];
    if (i == 0) continue;
    b.normed[i] = own || i == 1 ? take(rows * g_stride_ * element_) : b.normed[1];
  }
  b.attended = take(rows * g_stride_ * element_);
  b.z = take(rows * g_ * element_);
  b.a1 = take(rows * kernels().ffn.bytes(dtype_, g_).row);
  b.y = take(rows * c_ * element_);
  // The odd element behind a row takes part in products, with a weight of zero.
  if (g_stride_ != g_ && base != nullptr) {
    std::fill_n(b.attended, rows * g_stride_ * element_, 0);
  }
  return b;
}

Map Block::rows_map(char* data, int64_t stride, int64_t channel) const {
  char* const first = data != nullptr ? data + channel * element_ : nullptr;
  return {first, pixels() * stride, width_ * stride, stride, 1};
}

Map Block::images_of(const Map& map, int64_t image, int64_t channel) const {
  Map part = map;
  part.data = static_cast<char*>(map.data) + (image * map.image + channel * map.channel) * element_;
  return part;
}

BranchIn Block::in(int64_t i, int64_t image, const Between& b) const {
  const BlockBranch& branch = branches_[static_cast<size_t>(i)];
  BranchIn in{};
  in.x = images_of(x_, image, i * g_);
  in.height = height_;
  in.width = width_;
  in.channels = g_;
  in.outputs = branch.w_in.outputs();
  in.dtype = dtype_;
  in.ln_w = branch.ln_w.get();
  in.ln_b = branch.ln_b.get();
  in.weights = branch.w_in.bytes.get();
  in.bias = branch.b_in.get();
  in.eps = kEps;
  in.normed = b.normed[i];
  in.out = b.projected[i];
  return in;
}

Attention Block::attention(int64_t i, const Between& b) const {
  const BlockBranch& branch = branches_[static_cast<size_t>(i)];
  const int64_t stride = in_stride(i);
  Attention a{};
  a.q = rows_map(b.projected[i], stride, 0);
  a.k = rows_map(b.projected[i], stride, g_);
  a.v = i == 0 ? rows_map(b.projected[i], stride, 2 * g_) : rows_map(b.y, c_, (i - 1) * g_);
  a.out = rows_map(b.attended, g_stride_, 0);
  a.dtype = dtype_;
  a.bias = branch.table.get();
  a.heads = heads_;
  a.head_dim = g_ / heads_;
  a.scale = 1 / std::sqrt(static_cast<double>(a.head_dim));
  a.rows = branch.rows;
  a.columns = branch.columns;
  return a;
}

BranchOut Block::after(int64_t i, int64_t image, const Between& b) const {
  const BlockBranch& branch = branches_[static_cast<size_t>(i)];
  BranchOut after{};
  after.x = images_of(x_, image, i * g_);
  after.out = rows_map(b.z, g_, 0);
  after.height = height_;
  after.width = width_;
  after.channels = g_;
  after.dtype = dtype_;
  after.attended = b.attended;
  after.normed = b.normed[i];
  after.weights = branch.w_out.bytes.get();
  after.bias = branch.b_out.get();
  return after;
}

Ffn Block::ffn(int64_t i, int64_t images, const Between& b) const {
  Ffn f = branches_[static_cast<size_t>(i)].ffn;
  f.batch = images;
  f.x = rows_map(b.z, g_, 0);
  f.y = rows_map(b.y, c_, i * g_);
  f.a1 = b.a1;
  return f;
}

Fusion Block::fusion(int64_t image, const Between& b) const {
  Fusion f{};
  f.dtype = dtype_;
  f.channels = c_;
  f.width = d_;
  f.weights = fused_.get();
  f.x = b.y;
  f.x_row = c_;
  f.out = images_of(out_, image, 0).data;
  f.out_row = c_;
  return f;
}

int64_t Block::scratch_bytes() const {
  const AttentionKernels& k = kernels().attention;
  const Between none{};
  int64_t bytes = std::max(kernels().ffn.bytes(dtype_, g_).scratch,
                           kernels().fusion.fusion_scratch(fusion(0, none), kFusionRows));
  for (int64_t i = 0; i < kBranches; ++i) {
    bytes = std::max({bytes, k.branch_in_scratch(in(i, 0, none)),
                      k.attention_scratch(attention(i, none)),
                      k.branch_out_scratch(after(i, 0, none))});
  }
  return ceil_div(bytes, 64) * 64;
}

template <class Run>
void Block::run(int64_t image, int64_t images, const Between& b, const Run& run) const {
  const int64_t rows = images * pixels(), square = rows * g_ * g_, bytes = scratch_bytes();
  const int64_t each = rows_of_task(rows), tasks = ceil_div(rows, each), units = ffn_units(rows);
  const AttentionKernels& k = kernels().attention;
  const auto project = [&](int64_t begin, int64_t end) {
    run(tasks * (end - begin), (end - begin) * 2 * square, bytes, [&](int64_t task, char* scratch) {
      const int64_t row = task % tasks * each;
      k.branch_in(in(begin + task / tasks, image, b), row, std::min(rows, row + each), scratch);
    });
  };
  const Fusion fused = fusion(image, b);
  const auto fuse = [&](int64_t begin, int64_t end, char* scratch) {
    kernels().fusion.fusion(fused, begin, end - begin, scratch);
  };
  // Branches take nothing but v from each other.
  if constexpr (Run::kShared) project(0, kBranches);
  for (int64_t i = 0; i < kBranches; ++i) {
    const Attention a = attention(i, b);
    if constexpr (Run::kShared) {
      run_attention(a, images);
    } else {
      project(i, i + 1);
      k.attention(a, 0, images * a.windows(), 0, heads_, run.scratch);
    }
    const BranchOut z = after(i, image, b);
    const Ffn f = ffn(i, images, b);
    run(units, 2 * square, bytes, [&](int64_t unit, char* scratch) {
      k.branch_out(z, ffn_begin(rows, unit), ffn_begin(rows, unit + 1), scratch);
      kernels().ffn.in(f, unit, scratch);
    });
    // Threads are not called together once more for the fusion: its rows follow their unit.
    const bool last = Run::kShared && i + 1 == kBranches;
    run(units, square + (last ? rows * c_ * (c_ + 2 * d_) : 0), bytes,
        [&](int64_t unit, char* scratch) {
          kernels().ffn.out(f, unit, scratch);
          if (last) fuse(ffn_begin(rows, unit), ffn_begin(rows, unit + 1), scratch);
        });
  }
  if constexpr (!Run::kShared) {
    run(tasks, 0, bytes, [&](int64_t task, char* scratch) {
      fuse(task * each, std::min(rows, (task + 1) * each), scratch);
    });
  }
}

void Block::run_together() const {
  const Bytes memory = aligned_bytes(between(images_, true, nullptr).bytes);
  run(0, images_, between(images_, true, memory.get()), Threads{});
}

void Block::run_apart(int64_t chunk) const {
  const int64_t scratch = scratch_bytes(), bytes = scratch + between(chunk, false, nullptr).bytes;
  run_tasks(ceil_div(images_, chunk), images_ * pixels() * products(), bytes,
            [&](int64_t task, char* memory) {
              const int64_t image = task * chunk, images = std::min(chunk, images_ - image);
              run(image, images, between(images, false, memory + scratch), Alone{memory});
            });
}

}  // namespace ppmoe::ladder_attention
