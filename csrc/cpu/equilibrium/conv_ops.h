// equilibrium_conv_cell on tensors, and what its forward and backward share: checks, packed
// weights, and images in bands of rows for the threads.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/equilibrium/conv_kernels.h"
#include "cpu/equilibrium/conv_solve.h"
#include "ppmoe/capability.h"
#include "ppmoe/op.h"

namespace ppmoe::conv_cell {

std::tuple<Tensor, Tensor, Tensor> equilibrium_conv_cell(Tensor u, Tensor w_u, Tensor w1, Tensor b1,
                                                         Tensor w2, Tensor b2, Tensor w3, Tensor b3,
                                                         std::optional<Tensor> z0,
                                                         StringHandle activation_name,
                                                         StringHandle solver_name, double atol,
                                                         double rtol, int64_t max_iter);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
equilibrium_conv_cell_backward(Tensor grad_z, Tensor u, Tensor w_u, Tensor w1, Tensor b1, Tensor w2,
                               Tensor b2, Tensor w3, Tensor z, Tensor residual,
                               StringHandle activation_name, StringHandle solver_name, double atol,
                               std::optional<double> rtol, int64_t max_iter);

// The kernels of the instruction set in use.
const Kernels& kernels();

struct Parameters {
  Tensor w_u, w1, b1, w2, b2, w3;
  std::optional<Tensor> b3;
};

// Checks the arguments, and closes what is not contiguous.
Sizes check_cell(const char* op, Tensor& u, Parameters& p);
void check_map(const char* op, const char* name, Tensor& map, const Tensor& u, const Sizes& s);
Activation check_solver(const char* op, const String& activation, const String& solver, double atol,
                        double rtol, int64_t max_iter);

// More inputs than this are injected once an image, not at every evaluation.
constexpr int64_t kDirectInputs = 6;

// Packed weights of a call.
class Weights {
 public:
  Weights(const Sizes& s, const Parameters& p, DType dtype, bool backward);
  bool injects() const { return injects_; }
  // Fills in the weights of f, of the injection, or of the adjoint.
  void forward(Pass& p) const;
  void injection(Pass& p) const;
  void adjoint(Pass& p) const;
  Linear turned_input() const { return grad_u_; }

 private:
  template <class S>
  void build(const Sizes& s, const Parameters& p, DType dtype, bool backward);
  template <class S, class F>
  Linear linear(int64_t outputs, int64_t inputs, const S* bias, const F& weight);

  bool injects_;
  std::vector<Bytes> kept_;
  Linear in_, middle_, out_, inject_, adjoint_in_, adjoint_middle_, adjoint_out_, grad_u_;
};

// Bands of rows depend on the sizes alone.
struct Bands {
  int64_t height, rows, count;

  explicit Bands(const Sizes& s);
  int64_t first(int64_t band) const { return band * rows; }
  int64_t past(int64_t band) const { return std::min(height, (band + 1) * rows); }
};

// Memory of an image in work.
class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t here = size_;
    // Five lines more, so that planes of one size do not fall into the same sets of a cache.
    size_ += round_up(bytes, 64) + 320;
    return here;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// An image of contiguous maps.
inline const void* image_of(const Tensor& maps, int64_t index) {
  const int64_t bytes = maps.numel() / maps.size(0) * static_cast<int64_t>(maps.element_size());
  return static_cast<const char*>(maps.const_data_ptr()) + index * bytes;
}
inline void* result_of(const Tensor& maps, int64_t index) {
  const int64_t bytes = maps.numel() / maps.size(0) * static_cast<int64_t>(maps.element_size());
  return data<char>(maps) + index * bytes;
}

// Multiply-adds of one evaluation.
inline int64_t products_of(const Sizes& s) {
  return s.height * s.width * s.hidden * (9 * s.hidden + 2 * s.channels + s.inputs);
}

// Runs all images of a job. An image goes through phases: job.work(image, band, scratch) for every
// band of rows, then job.next(image) on one thread, until that says false. Small images are one
// band and go through all their phases on one thread, `together` of them one after the other; large
// ones share the threads, as many at a time as keep these busy.
template <class Job>
void run_images(Job& job, int64_t images, int64_t together, const Bands& bands, int64_t products,
                int64_t scratch_bytes) {
  const int64_t image_bytes = round_up(job.bytes(), 4096);
  if (bands.count == 1) {
    run_tasks(ceil_div(images, together), images * products, image_bytes + scratch_bytes,
              [&](int64_t task, char* bytes) {
                const int64_t past = std::min(images, (task + 1) * together);
                for (int64_t at = task * together; at < past; ++at) {
                  auto image = job.begin(at, bytes);
                  do {
                    job.work(image, 0, bytes + image_bytes);
                  } while (job.next(image));
                }
              });
    return;
  }
  const int64_t wanted = ceil_div(3 * torch::stable::get_num_threads(), bands.count);
  const int64_t slots = std::min(images, wanted);
  Bytes memory = aligned_bytes(slots * image_bytes);
  using Image = decltype(job.begin(0, nullptr));
  std::vector<Image> active;
  int64_t started = 0;
  for (; started < slots; ++started) {
    active.push_back(job.begin(started, memory.get() + started * image_bytes));
  }
  while (!active.empty()) {
    const auto count = static_cast<int64_t>(active.size());
    run_tasks(count * bands.count, count * products, scratch_bytes, [&](int64_t task, char* bytes) {
      job.work(active[static_cast<size_t>(task / bands.count)], task % bands.count, bytes);
    });
    std::vector<Image> left;
    for (Image& image : active) {
      if (job.next(image)) {
        left.push_back(image);
      } else if (started < images) {
        left.push_back(job.begin(started++, image.memory));
      }
    }
    active.swap(left);
  }
}

}  // namespace ppmoe::conv_cell
