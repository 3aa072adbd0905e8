// anderson_mix: checks, what is decided for a sample between the passes, and threads.
#include "cpu/equilibrium/mix_ops.h"

#include <cmath>
#include <vector>

#include "cpu/equilibrium/mix_kernels.h"
#include "ppmoe/capability.h"

namespace ppmoe::mix {
namespace {

constexpr const char* kOp = "anderson_mix";
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // of a history
constexpr double kDiverged = 1e4;                   // as in mixing.py
// Columns of `counters` and `values`, and the first one's values, as in anderson_mix.py.
enum Counter { kStatus, kSteps, kHeldPairs, kSlot, kBestAt, kCounters };
enum Value { kResidual, kBest, kLimit, kValues };
enum Status { kRunning, kConverged, kDivergedStatus, kStopped };

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* const all[kIsaCount] = PPMOE_KERNEL_TABLES;
    return all[static_cast<int>(selected_isa())];
  }();
  return *table;
}

struct Size {
  const char* axis;
  int64_t size;
  const char* why;
};

void check_written(const char* name, const Tensor& tensor, const char* axes,
                   std::initializer_list<Size> sizes, ScalarType dtype, const char* why) {
  check_dim(kOp, name, tensor, axes);
  check_dtype(kOp, name, tensor, {dtype}, why);
  int64_t axis = 0;
  for (const Size& each : sizes) {
    check_size(kOp, name, each.axis, tensor.size(axis++), each.size, each.why);
  }
  if (!tensor.is_contiguous()) {
    bad_value(kOp, ": ", name, " is not contiguous; allowed: contiguous, as it is written");
  }
}

void check_tolerance(const char* name, double value) {
  if (!(value >= 0 && value < HUGE_VAL)) {
    bad_value(kOp, ": ", name, " is ", value, "; allowed: 0 or more, finite");
  }
}

void check_rows(const Tensor& rows, int64_t samples) {
  const int64_t* const each = static_cast<const int64_t*>(rows.const_data_ptr());
  int64_t before = -1;
  for (int64_t i = 0; i < rows.numel(); ++i) {
    if (each[i] < 0 || each[i] >= samples) {
      bad_index(kOp, ": rows holds ", each[i], "; allowed: 0 to ", samples - 1);
    }
    if (each[i] <= before) {
      bad_value(kOp, ": rows holds ", each[i], " after ", before, "; allowed: rising rows");
    }
    before = each[i];
  }
}

// The step's scalars, and where a sample's numbers are.
struct Step {
  double atol, rtol, damping, ridge;
  bool last;
  int pairs;
};
struct Numbers {
  double *gram, *values;
  int32_t* counters;
};

// Reads what was held before the step into `s`.
void recall(const Step& step, const Numbers& numbers, Sample& s) {
  const int32_t* const c = numbers.counters;
  s.first = c[kSteps] == 0;
  // A slot that is out of range must not become an address.
  s.slot = c[kSlot] >= 0 && c[kSlot] < step.pairs ? c[kSlot] : 0;
  s.next = (s.slot + 1) % step.pairs;
  const int old = std::clamp(c[kHeldPairs], 0, std::max(step.pairs - 2, 0));
  s.held = 0;
  for (int row = 0; row < step.pairs; ++row) {
    const int age = (s.slot - row + step.pairs) % step.pairs;
    if (age >= 1 && age <= old) s.rows[s.held++] = row;
  }
}

// The weights of the differences, the new one among them, and their rows of the Gram matrix.
void weigh(const Step& step, const Sample& s, const double* sums, double* gram, Choice& choice) {
  int used[kMostHistory], n = 0;
  double projection[kMostHistory] = {}, part[kMostHistory * kMostHistory] = {};
  double gamma[kMostHistory] = {};
  const auto at = [&](int i, int j) -> double& { return gram[i * step.pairs + j]; };
  at(s.slot, s.slot) = sums[kSquareNew];
  bool placed = false;
  const auto place = [&] {
    placed = true;
    projection[n] = sums[kNewG];
    used[n++] = s.slot;
  };
  for (int j = 0; j < s.held; ++j) {
    const int row = s.rows[j];
    if (!placed && row > s.slot) place();
    at(s.slot, row) = at(row, s.slot) = sums[kHeld + 2 * j];
    projection[n] = sums[kHeld + 2 * j + 1];
    used[n++] = row;
  }
  if (!placed) place();
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) part[i * n + j] = at(used[i], used[j]);
  }
  equilibrium::mixing_weights(part, n, projection, n, step.ridge, gamma);
  choice.push = true;
  choice.held = s.held;
  for (int i = 0, j = 0; i < n; ++i) {
    if (used[i] == s.slot) {
      choice.weight = gamma[i];
    } else {
      choice.weights[j++] = gamma[i];
    }
  }
}

Choice decide(const Step& step, const Sample& s, const double* sums, const Numbers& numbers) {
  double* const values = numbers.values;
  int32_t* const counters = numbers.counters;
  const double r = std::sqrt(sums[kSquareG]), size = std::sqrt(sums[kSquareF]);
  const double before = values[kResidual];
  if (s.first) values[kLimit] = kDiverged * (std::sqrt(sums[kSquareZ]) + size);
  const bool diverged = !(std::isfinite(r) && r <= values[kLimit]);
  const bool converged = !diverged && r <= step.atol + step.rtol * size;
  const bool better = s.first || r < values[kBest];
  Choice choice{};
  choice.stop = diverged || converged || step.last;
  choice.keep_new = better && choice.stop;
  choice.keep_old = !better && counters[kBestAt] == counters[kSteps];
  choice.put_back = choice.stop && !better;
  choice.left = 1 - step.damping;
  const bool raised = counters[kHeldPairs] > 0 && r > before;
  counters[kHeldPairs] = 0;
  if (!choice.stop && !s.first && !raised && s.dg != nullptr) {
    weigh(step, s, sums, numbers.gram, choice);
    counters[kHeldPairs] = s.held + 1;
  }
  counters[kSteps] += 1;
  counters[kSlot] = s.next;
  values[kResidual] = r;
  if (better) {
    values[kBest] = r;
    counters[kBestAt] = counters[kSteps];
  }
  if (diverged) values[kBest] = HUGE_VAL;
  if (choice.stop) {
    counters[kStatus] = diverged ? kDivergedStatus : converged ? kConverged : kStopped;
  }
  return choice;
}

void measure_piece(const Sample& s, int64_t piece, double* sums) {
  std::fill_n(sums, kMostSums, 0.0);
  kernels().measure(s, piece * kPiece, std::min(s.width, (piece + 1) * kPiece), sums);
}

void run(const Step& step, const std::vector<Sample>& samples,
         const std::vector<Numbers>& numbers) {
  if (samples.empty()) return;
  const auto count = static_cast<int64_t>(samples.size());
  const int64_t width = samples[0].width, pieces = ceil_div(width, kPiece);
  const int64_t products = count * width * (4 * step.pairs + 2);
  const auto add = [](double* to, const double* from) {
    for (int i = 0; i < kMostSums; ++i) to[i] += from[i];
  };
  // A sample that one thread takes as a whole is read from memory once less.
  if (pieces <= 1 || count >= 2 * torch::stable::get_num_threads()) {
    return run_tasks(count, products, 0, [&](int64_t task, char*) {
      const Sample& s = samples[static_cast<size_t>(task)];
      double total[kMostSums] = {}, sums[kMostSums];
      for (int64_t piece = 0; piece < pieces; ++piece) {
        measure_piece(s, piece, sums);
        add(total, sums);
      }
      const Choice choice = decide(step, s, total, numbers[static_cast<size_t>(task)]);
      kernels().mix(s, choice, 0, width);
    });
  }
  std::vector<double> sums(static_cast<size_t>(count * pieces * kMostSums));
  const auto sums_of = [&](int64_t task) { return sums.data() + task * kMostSums; };
  run_tasks(count * pieces, products, 0, [&](int64_t task, char*) {
    measure_piece(samples[static_cast<size_t>(task / pieces)], task % pieces, sums_of(task));
  });
  std::vector<Choice> choices;
  for (int64_t i = 0; i < count; ++i) {
    double total[kMostSums] = {};
    for (int64_t piece = 0; piece < pieces; ++piece) add(total, sums_of(i * pieces + piece));
    const auto at = static_cast<size_t>(i);
    choices.push_back(decide(step, samples[at], total, numbers[at]));
  }
  run_tasks(count * pieces, products, 0, [&](int64_t task, char*) {
    const auto at = static_cast<size_t>(task / pieces);
    const int64_t begin = task % pieces * kPiece;
    kernels().mix(samples[at], choices[at], begin, std::min(width, begin + kPiece));
  });
}

}  // namespace

Tensor anderson_mix(Tensor f, Tensor z, Tensor z_next, Tensor best_z, Tensor best_f, Tensor dg,
                    Tensor df, Tensor gram, Tensor values, Tensor counters,
                    std::optional<Tensor> rows, double atol, double rtol, double damping,
                    bool last) {
  check_dim(kOp, "f", f, "A, d");
  check_dtype(kOp, "f", f, kFloats);
  check_dim(kOp, "z", z, "B, d");
  const ScalarType type = f.scalar_type(), wide = wide_dtype(type);
  const Size batch{"B", z.size(0), "as z"}, columns{"d", f.size(1), "as f"};
  const auto check_state = [&](const char* name, const Tensor& tensor) {
    check_written(name, tensor, "B, d", {batch, columns}, type, "as f");
  };
  check_state("z", z);
  check_state("z_next", z_next);
  check_state("best_z", best_z);
  check_state("best_f", best_f);
  check_dim(kOp, "df", df, "B, R, d");
  const int64_t pairs = df.size(1);
  check_between(kOp, "the number of rows R of df", pairs, 1, kMostHistory + 1);
  const Size rows_of_history{"R", pairs, "as df"};
  const char* const summed = "what f is summed in";
  check_written("df", df, "B, R, d", {batch, rows_of_history, columns}, wide, summed);
  check_dim(kOp, "dg", dg, "B, R, d");
  if (pairs != 1 || dg.size(1) != 0) {
    check_written("dg", dg, "B, R, d", {batch, rows_of_history, columns}, wide, summed);
  }
  const char* const only = "its only one";
  check_written("gram", gram, "B, R, R", {batch, rows_of_history, rows_of_history},
                ScalarType::Double, only);
  check_written("values", values, "B, N", {batch, {"N", kValues, "its only size"}},
                ScalarType::Double, only);
  check_written("counters", counters, "B, N", {batch, {"N", kCounters, "its only size"}},
                ScalarType::Int, only);
  if (rows.has_value()) {
    check_dim(kOp, "rows", *rows, "A");
    check_dtype(kOp, "rows", *rows, {ScalarType::Long});
    check_size(kOp, "rows", "A", rows->size(0), f.size(0), "as f");
  } else {
    check_size(kOp, "f", "A", f.size(0), batch.size, "as B of z, without rows");
  }
  check_tolerance("atol", atol);
  check_tolerance("rtol", rtol);
  if (!(damping > 0 && damping <= 1)) {
    bad_value(kOp, ": damping is ", damping, "; allowed: above 0, at most 1");
  }
  if (rows.has_value()) {
    rows = closed(*rows);
    check_rows(*rows, batch.size);
  }

  f = with_closed_rows(f);
  const int64_t width = columns.size, size = f.element_size(), wider = df.element_size();
  const bool mixes = pairs > 1, large = df.numel() * wider > kStreamBytes;
  const Step step{atol,    rtol,
                  damping, type == ScalarType::Double ? 1e-12 : 1e-8,
                  last,    static_cast<int>(pairs)};
  std::vector<Sample> samples;
  std::vector<Numbers> numbers;
  for (int64_t i = 0; i < f.size(0); ++i) {
    const int64_t b = rows.has_value() ? static_cast<const int64_t*>(rows->const_data_ptr())[i] : i;
    const Numbers own{data<double>(gram) + b * pairs * pairs, data<double>(values) + b * kValues,
                      data<int32_t>(counters) + b * kCounters};
    if (own.counters[kStatus] != kRunning) continue;
    const auto state = [&](const Tensor& tensor) { return data<char>(tensor) + b * width * size; };
    const auto history = [&](const Tensor& tensor) {
      return data<char>(tensor) + b * pairs * width * wider;
    };
    Sample s{};
    s.dtype = kernel_dtype(type);
    s.width = width;
    s.stream = large;
    s.f = static_cast<const char*>(f.const_data_ptr()) + i * f.stride(0) * size;
    s.z = state(z), s.z_next = state(z_next);
    s.best_z = state(best_z), s.best_f = state(best_f);
    s.dg = mixes ? history(dg) : nullptr;
    s.df = history(df);
    recall(step, own, s);
    samples.push_back(s);
    numbers.push_back(own);
  }
  run(step, samples, numbers);

  Tensor running = new_tensor({}, ScalarType::Int);
  int32_t& left = *data<int32_t>(running) = 0;
  for (int64_t b = 0; b < batch.size; ++b) {
    left += data<int32_t>(counters)[b * kCounters + kStatus] == kRunning;
  }
  return running;
}

}  // namespace ppmoe::mix
