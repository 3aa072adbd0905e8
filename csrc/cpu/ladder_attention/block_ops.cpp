// ladder_block: the phases of its branches and the fusion behind them, for all images together or
// for some images a thread.
#include "cpu/ladder_attention/block_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/ladder_attention/attention_ops.h"
#include "cpu/ladder_attention/fusion_ops.h"

namespace ppmoe::ladder_attention {
namespace {

constexpr const char* kOp = "ladder_block";
constexpr double kEps = 1e-5;
constexpr int64_t kBranches = 3;
// Images that one thread takes through the whole block have at least so many pixels.
constexpr int64_t kChunkPixels = 192;
constexpr int64_t kChunksPerThread = 2;

enum Part {
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
  kParts,
};
constexpr const char* kPartNames[kParts] = {
    "ln1_w", "ln1_b", "w_in", "b_in", "bias_table", "w_out",  "b_out", "ln2_w",
    "ln2_b", "f1_w",  "f1_b", "dw_w", "dw_b",       "dw_off", "f2_w",  "f2_b",
};
constexpr const char* kFusionNames[] = {"w1", "b1", "w2", "b2", "wp", "bp"};
constexpr int64_t kFusion = kBranches * kParts, kParameters = kFusion + 6;

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void check_parameter(const Tensor& tensor, int64_t index, const Tensor& x,
                     const std::vector<int64_t>& shape) {
  const bool branch = index < kFusion;
  const int64_t part = index % kParts;
  const auto label = [&] {
    if (!branch) return concat("params[", index, "] (fusion ", kFusionNames[index - kFusion], ")");
    return concat("params[", index, "] (branch ", index / kParts, " ", kPartNames[part], ")");
  };
  const bool wide = branch && (part == kLn1W || part == kLn1B || part == kTable || part == kLn2W ||
                               part == kLn2B);
  const ScalarType own = x.scalar_type(), came = tensor.scalar_type();
  if (wide && came != own) check_wide(kOp, label().c_str(), tensor, x);
  if (!wide && came != own) check_dtype(kOp, label().c_str(), tensor, {own}, "as x");
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    bad_value(kOp, ": ", label(), " has shape ", text_of({sizes.begin(), sizes.end()}),
              "; expected ", text_of(shape));
  }
}

void check_block(const Tensor& x, const std::vector<Tensor>& params, int64_t heads,
                 const Pair& window, const Pair& shift) {
  check_dim(kOp, "x", x, "B, Hm, Wm, C");
  check_dtype(kOp, "x", x, kFloats);
  const int64_t c = x.size(3), g = c / kBranches;
  if (c % kBranches != 0) {
    bad_value(kOp, ": x has C = ", c, "; expected a multiple of 3 (three branches)");
  }
  check_windows(kOp, g, heads, window, shift);
  if (static_cast<int64_t>(params.size()) != kParameters) {
    bad_value(kOp, ": params has ", params.size(), " tensors; expected ", kParameters,
              " (three times 16 of a branch, 6 of the fusion)");
  }
  const int64_t d = params[kFusion].dim() == 2 ? params[kFusion].size(0) : 0;
  const int64_t table = (2 * window[0] - 1) * (2 * window[1] - 1);
  for (int64_t index = 0; index < kFusion; ++index) {
    const int64_t outputs = (index < kParts ? 3 : 2) * g;
    const std::vector<int64_t> shapes[kParts] = {
        {g},    {g}, {outputs, g}, {outputs}, {table, heads}, {g, g}, {g}, {g}, {g},
        {g, g}, {g}, {g, 3, 3},    {g},       {g, 3, 3},      {g, g}, {g}};
    check_parameter(params[static_cast<size_t>(index)], index, x, shapes[index % kParts]);
  }
  const std::vector<int64_t> shapes[] = {{d, c}, {d}, {c, d}, {c}, {c, c}, {c}};
  for (int64_t i = 0; i < 6; ++i) {
    check_parameter(params[static_cast<size_t>(kFusion + i)], kFusion + i, x, shapes[i]);
  }
}

FfnParameter ffn_parameter(const Tensor& tensor) {
  return {tensor.const_data_ptr(), kernel_dtype(tensor.scalar_type())};
}

// The parameters of a branch as the kernels take them.
struct Branch {
  Packing w_in, w_out;
  Bytes ln_w, ln_b, b_in, table, b_out, prepared;
  std::vector<Tensor> closed_ones;
  Ffn ffn{};
  Cut rows, columns;

  Branch(const Tensor* p, const Tensor& x, const Pair& window, const Pair& shift, int64_t sign)
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
    const auto parameter = [&](Part part) {
      closed_ones.push_back(closed(p[part]));
      return ffn_parameter(closed_ones.back());
    };
    const auto matrix = [&](Part part) {
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
};

// Tasks over the threads, or one after another on this one.
struct Threads {
  template <class F>
  void operator()(int64_t tasks, int64_t products, int64_t bytes, const F& body) const {
    run_tasks(tasks, products, bytes, body);
  }
  static constexpr bool kShared = true;
};
struct Alone {
  char* scratch;
  template <class F>
  void operator()(int64_t tasks, int64_t, int64_t, const F& body) const {
    for (int64_t task = 0; task < tasks; ++task) body(task, scratch);
  }
  static constexpr bool kShared = false;
};

struct Block {
  int64_t heads, height, width, g, c, d;
  DType dtype;
  int64_t element, g_stride;  // bytes; elements
  Map x, out;
  std::vector<Branch> branches;
  Bytes fused{nullptr, &std::free};

  Block(const Tensor& input, const Tensor& result, const std::vector<Tensor>& params,
        int64_t num_heads, const Pair& window, const Pair& shift)
      : heads(num_heads),
        height(input.size(1)),
        width(input.size(2)),
        g(input.size(3) / kBranches),
        c(input.size(3)),
        d(params[kFusion].size(0)),
        dtype(kernel_dtype(input.scalar_type())),
        element(input.element_size()),
        g_stride(kernels().attention.packed_stride(dtype, g)),
        x(map_of(input)),
        out(map_of(result)) {
    static constexpr int64_t kSigns[kBranches] = {0, 1, -1};
    branches.reserve(kBranches);
    for (int64_t i = 0; i < kBranches; ++i) {
      branches.emplace_back(params.data() + i * kParts, input, window, shift, kSigns[i]);
    }
    pack(params.data() + kFusion);
  }

  int64_t pixels() const { return height * width; }

  // Everything is packed in one go: the feed-forward networks, the fusion, the projections.
  void pack(const Tensor* p) {
    const Tensor b1 = closed(p[1]), b2 = closed(p[3]), bp = closed(p[5]);
    const FusionLayer layer{dtype,
                            c,
                            d,
                            matrix_of(p[0]),
                            matrix_of(p[2]),
                            matrix_of(p[4]),
                            b1.const_data_ptr(),
                            b2.const_data_ptr(),
                            bp.const_data_ptr(),
                            false};
    const FusionKernels& k = kernels().fusion;
    fused = aligned_bytes(k.fusion_bytes(layer));
    std::vector<const Packing*> packings;
    int64_t panels = 0;
    for (const Branch& branch : branches) {
      for (const Packing* each : {&branch.w_in, &branch.w_out}) {
        packings.push_back(each);
        panels += each->panels();
      }
    }
    const int64_t units = k.fusion_units(layer), elements = 16 * g * g + c * (c + 2 * d);
    run_tasks(kBranches + units + panels, 8 * elements, 0, [&](int64_t task, char*) {
      if (task < kBranches) return kernels().ffn.prepare(branches[static_cast<size_t>(task)].ffn);
      task -= kBranches;
      if (task < units) return k.fusion_pack(layer, task, fused.get());
      task -= units;
      for (const Packing* each : packings) {
        if (task < each->panels()) return each->pack(task);
        task -= each->panels();
      }
    });
  }

  // What lies between the phases for some images.
  struct Between {
    char *projected[kBranches], *normed[kBranches], *attended, *z, *a1, *y;
    int64_t bytes = 0;
  };
  // `apart`: every branch has memory of its own for what comes before its attention.
  Between between(int64_t images, bool apart, char* base) const {
    const int64_t rows = images * pixels();
    Between b{};
    const auto take = [&](int64_t bytes) {
      char* const at = base + b.bytes;
      b.bytes += ceil_div(bytes + 64 * 8, 64) * 64;  // vectors may be read past the end
      return at;
    };
    for (int64_t i = 0; i < kBranches; ++i) {
      const bool own = i == 0 || apart;
      b.projected[i] = own ? take(rows * in_stride(i == 0 ? 0 : 1) * element) : b.projected[0];
      b.normed[i] = own || i == 1 ? take(i == 0 ? 0 : rows * g_stride * element) : b.normed[1];
    }
    b.attended = take(rows * g_stride * element);
    b.z = take(rows * g * element);
    b.a1 = take(rows * kernels().ffn.bytes(dtype, g).row);
    b.y = take(rows * c * element);
    return b;
  }
  int64_t in_stride(size_t branch) const {
    return kernels().attention.packed_stride(dtype, branches[branch].w_in.outputs());
  }
  Map rows_map(char* data, int64_t stride, int64_t channel) const {
    return {data + channel * element, pixels() * stride, width * stride, stride, 1};
  }
  Map of_images(const Map& map, int64_t image, int64_t channel) const {
    Map part = map;
    part.data =
        static_cast<char*>(map.data) + (image * map.image + channel * map.channel) * element;
    return part;
  }

  BranchIn in(int64_t i, int64_t image, const Between& b) const {
    const Branch& branch = branches[static_cast<size_t>(i)];
    BranchIn in{};
    in.x = of_images(x, image, i * g);
    in.height = height;
    in.width = width;
    in.channels = g;
    in.outputs = branch.w_in.outputs();
    in.dtype = dtype;
    in.ln_w = branch.ln_w.get();
    in.ln_b = branch.ln_b.get();
    in.weights = branch.w_in.bytes.get();
    in.bias = branch.b_in.get();
    in.eps = kEps;
    in.normed = i > 0 ? b.normed[i] : nullptr;
    in.out = b.projected[i];
    return in;
  }

  Attention attention(int64_t i, const Between& b) const {
    const Branch& branch = branches[static_cast<size_t>(i)];
    const int64_t stride = in_stride(static_cast<size_t>(i));
    Attention a{};
    a.q = rows_map(b.projected[i], stride, 0);
    a.k = rows_map(b.projected[i], stride, g);
    a.v = i == 0 ? rows_map(b.projected[i], stride, 2 * g) : rows_map(b.y, c, (i - 1) * g);
    a.out = rows_map(b.attended, g_stride, 0);
    a.dtype = dtype;
    a.bias = branch.table.get();
    a.heads = heads;
    a.head_dim = g / heads;
    a.scale = 1 / std::sqrt(static_cast<double>(a.head_dim));
    a.rows = branch.rows;
    a.columns = branch.columns;
    return a;
  }

  BranchOut after(int64_t i, int64_t image, const Between& b) const {
    const Branch& branch = branches[static_cast<size_t>(i)];
    BranchOut after{};
    after.x = of_images(x, image, i * g);
    after.out = rows_map(b.z, g, 0);
    after.height = height;
    after.width = width;
    after.channels = g;
    after.dtype = dtype;
    after.attended = b.attended;
    after.normed = i > 0 ? b.normed[i] : nullptr;
    after.weights = branch.w_out.bytes.get();
    after.bias = branch.b_out.get();
    return after;
  }

  Ffn ffn(int64_t i, int64_t images, const Between& b) const {
    Ffn f = branches[static_cast<size_t>(i)].ffn;
    f.batch = images;
    f.x = rows_map(b.z, g, 0);
    f.y = rows_map(b.y, c, i * g);
    f.a1 = b.a1;
    return f;
  }

  Fusion fusion(int64_t image, const Between& b) const {
    return {dtype, c, d, fused.get(), b.y, c, false, of_images(out, image, 0).data, c};
  }

  int64_t scratch_bytes() const {
    const AttentionKernels& k = kernels().attention;
    const Between none{};
    int64_t bytes = kernels().ffn.bytes(dtype, g).scratch;
    bytes = std::max(bytes, kernels().fusion.fusion_scratch(fusion(0, none), kFusionRows));
    for (int64_t i = 0; i < kBranches; ++i) {
      bytes = std::max(bytes, k.branch_in_scratch(in(i, 0, none)));
      bytes = std::max(bytes, k.attention_scratch(attention(i, none)));
      bytes = std::max(bytes, k.branch_out_scratch(after(i, 0, none)));
    }
    return bytes;
  }

  // Takes images first to first + images through the block.
  template <class Run>
  void run(int64_t first, int64_t images, const Between& b, const Run& run) const {
    const int64_t rows = images * pixels(), square = rows * g * g, bytes = scratch_bytes();
    const AttentionKernels& k = kernels().attention;
    const int64_t each = rows_of_task(rows), tasks = ceil_div(rows, each);
    const int64_t units = ffn_units(rows);
    if (g_stride != g) std::memset(b.attended, 0, static_cast<size_t>(rows * g_stride * element));
    const auto project = [&](int64_t begin, int64_t end) {
      run(tasks * (end - begin), (end - begin) * 2 * square, bytes,
          [&](int64_t task, char* scratch) {
            const int64_t row = task % tasks * each;
            k.branch_in(in(begin + task / tasks, first, b), row, std::min(rows, row + each),
                        scratch);
          });
    };
    // Nothing but v comes from another branch.
    if (Run::kShared) project(0, kBranches);
    for (int64_t i = 0; i < kBranches; ++i) {
      if (!Run::kShared) project(i, i + 1);
      const Attention a = attention(i, b);
      if constexpr (Run::kShared) {
        run_attention(a, images);
      } else {
        k.attention(a, 0, images * a.windows(), 0, heads, run.scratch);
      }
      const BranchOut z = after(i, first, b);
      const Ffn f = ffn(i, images, b);
      run(units, 2 * square, bytes, [&](int64_t unit, char* scratch) {
        k.branch_out(z, ffn_begin(rows, unit), ffn_begin(rows, unit + 1), scratch);
        kernels().ffn.in(f, unit, scratch);
      });
      const bool last = Run::kShared && i + 1 == kBranches;
      run(units, square + (last ? rows * c * (c + 2 * d) : 0), bytes,
          [&](int64_t unit, char* scratch) {
            kernels().ffn.out(f, unit, scratch);
            if (last) fuse(first, b, ffn_begin(rows, unit), ffn_begin(rows, unit + 1), scratch);
          });
    }
    if (Run::kShared) return;
    run(tasks, 0, bytes, [&](int64_t task, char* scratch) {
      fuse(first, b, task * each, std::min(rows, (task + 1) * each), scratch);
    });
  }
  void fuse(int64_t image, const Between& b, int64_t begin, int64_t end, char* scratch) const {
    kernels().fusion.fusion(fusion(image, b), begin, end - begin, scratch);
  }
};

// In a dtype that products have to widen, all of it is done wide.
Tensor run_wide(const Tensor& x, std::vector<Tensor> params, int64_t heads, const Pair& window,
                const Pair& shift) {
  for (Tensor& each : params) each = torch::stable::to(each, ScalarType::Float);
  const Tensor wide = ladder_block(torch::stable::to(x, ScalarType::Float), std::move(params),
                                   heads, window, shift);
  return torch::stable::to(wide, x.scalar_type());
}

}  // namespace

Tensor ladder_block(Tensor x, std::vector<Tensor> params, int64_t num_heads, Pair window,
                    Pair shift) {
  check_block(x, params, num_heads, window, shift);
  const int64_t images = x.size(0), pixels = x.size(1) * x.size(2);
  const DType dtype = kernel_dtype(x.scalar_type());
  if (x.numel() > 0 && kernels().attention.packed_dtype(dtype) != dtype) {
    return run_wide(x, std::move(params), num_heads, window, shift);
  }
  Tensor out = new_tensor({images, x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const Block block(x, out, params, num_heads, window, shift);
  // Where there are images enough, a thread takes some through the whole block: what lies between
  // the phases then stays in its caches, and nobody waits. No result depends on this.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = images / (kChunksPerThread * threads);
  const int64_t chunk =
      std::clamp<int64_t>(ceil_div(kChunkPixels, pixels), 1, std::max<int64_t>(most, 1));
  if (most == 0) {
    const Bytes memory = aligned_bytes(block.between(images, true, nullptr).bytes);
    block.run(0, images, block.between(images, true, memory.get()), Threads{});
    return out;
  }
  const int64_t scratch = ceil_div(block.scratch_bytes(), 64) * 64;
  const int64_t bytes = scratch + block.between(chunk, false, nullptr).bytes;
  const int64_t products =
      images * pixels * (16 * block.g * block.g + block.c * (block.c + 2 * block.d));
  run_tasks(ceil_div(images, chunk), products, bytes, [&](int64_t task, char* memory) {
    const int64_t first = task * chunk, here = std::min(chunk, images - first);
    block.run(first, here, block.between(here, false, memory + scratch), Alone{memory});
  });
  return out;
}

}  // namespace ppmoe::ladder_attention
