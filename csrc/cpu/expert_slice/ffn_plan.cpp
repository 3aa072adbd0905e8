// Checks of expert_ffn's arguments, and the cut of its rows into blocks.
#include "cpu/expert_slice/ffn_plan.h"

namespace ppmoe::expert_slice {
namespace {

// Tokens that are merged together: their sums stay in the last-level cache. But an expert should
// have a good many rows among them, as its weights are packed once a chunk.
constexpr int64_t kChunkTokens = 4096, kChunkRows = 256, kSmallChunkRows = 64;
constexpr int64_t kColumnStep = 32, kTasksPerThread = 4;
// Where every expert has few rows, time goes into reading weights, which small tasks share evenly
// and nothing is packed again for.
constexpr int64_t kFewTasksPerThread = 16, kFewColumns = 64;

std::vector<int64_t> read_bounds(const FfnArguments& a) {
  const Tensor list = closed(a.offsets);
  const int32_t* bound = static_cast<const int32_t*>(list.const_data_ptr());
  const int64_t most = a.reserved();
  for (int64_t i = 0; i < list.numel(); ++i) {
    if (bound[i] < 0 || bound[i] > most) {
      bad_index(a.op, ": offsets holds ", bound[i], "; allowed: 0 to ", most, " (T * min(K, L))");
    }
  }
  for (int64_t i = 1; i < list.numel(); ++i) {
    if (bound[i] < bound[i - 1]) {
      bad_value(a.op, ": offsets holds ", bound[i], " after ", bound[i - 1],
                "; allowed: values that do not decrease");
    }
  }
  return {bound, bound + list.numel()};
}

// Whether every expert's slots are in order: then those of some tokens lie together.
bool read_rows(const FfnArguments& a, FfnPlan& plan) {
  const Tensor slots = closed(a.slots);
  const int32_t* slot = static_cast<const int32_t*>(slots.const_data_ptr());
  const int64_t count = slots.numel(), low = plan.bounds.front(), high = plan.bounds.back();
  for (int64_t row = low; row < high; ++row) {
    if (slot[row] < 0 || slot[row] >= count) {
      bad_index(a.op, ": slots holds ", slot[row], "; allowed: 0 to ", count - 1);
    }
  }
  std::vector<bool> seen(static_cast<size_t>(high > low ? count : 0));
  for (int64_t row = low; row < high; ++row) {
    const auto at = seen.begin() + slot[row];
    if (*at) bad_value(a.op, ": slots holds ", slot[row], " twice; allowed: each slot once");
    *at = true;
  }
  bool ordered = true;
  for (int64_t e = 0; e < a.experts(); ++e) {
    const int32_t* begin = slot + plan.bounds[e];
    ordered = ordered && std::is_sorted(begin, slot + plan.bounds[e + 1]);
  }
  const int32_t top_k = static_cast<int32_t>(std::max<int64_t>(a.top_k(), 1));
  plan.tokens.resize(static_cast<size_t>(high));
  for (int64_t row = low; row < high; ++row) plan.tokens[row] = slot[row] / top_k;
  const Tensor weights = closed(a.weights);
  const auto gather = [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(weights.const_data_ptr()));
    for (int64_t row = low; row < high; ++row) to[row] = from[slot[row]];
  };
  plan.weights = aligned_bytes(high * weights.element_size());
  if (weights.element_size() == 8) {
    gather(reinterpret_cast<double*>(plan.weights.get()));
  } else {
    gather(reinterpret_cast<float*>(plan.weights.get()));
  }
  return ordered;
}

int64_t chunk_count(const FfnArguments& a, const FfnPlan& plan, bool ordered) {
  int64_t hit = 0;
  for (int64_t e = 0; e < a.experts(); ++e) hit += plan.rows(e) > 0;
  const int64_t by_tokens = ceil_div(a.tokens(), kChunkTokens);
  if (!ordered || hit == 0) return ordered ? std::max<int64_t>(1, by_tokens) : 1;
  const int64_t rows = plan.local() / hit;
  const int64_t wanted = std::min(by_tokens, std::max(rows / kChunkRows, by_tokens / 4));
  // Narrow outputs have too few columns for many threads.
  const int64_t slabs = std::max<int64_t>(1, a.hidden() / (2 * kColumnStep));
  const int64_t busy = ceil_div(2 * int64_t{torch::stable::get_num_threads()}, slabs);
  return std::max<int64_t>({1, wanted, std::min(busy, rows / kSmallChunkRows)});
}

bool few_rows(const std::vector<FfnBlock>& blocks) {
  return std::all_of(blocks.begin(), blocks.end(),
                     [](const FfnBlock& block) { return block.group <= kThinRows; });
}

}  // namespace

FfnArguments::FfnArguments(const char* name, Tensor x_, Tensor slots_, Tensor offsets_,
                           Tensor weights_, Tensor w_in_, Tensor w_out_,
                           std::optional<Tensor> b_out_, StringHandle activation_)
    : op(name),
      x(x_),
      slots(slots_),
      offsets(offsets_),
      weights(weights_),
      w_in(w_in_),
      w_out(w_out_),
      b_out(b_out_),
      activation_name(String(activation_).text()) {
  struct Choice {
    const char* name;
    Activation activation;
    bool gated;
  };
  constexpr Choice kChoices[] = {
      {"gelu", Activation::kGelu, false},  {"gelu_tanh", Activation::kGeluTanh, false},
      {"relu", Activation::kRelu, false},  {"silu", Activation::kSilu, false},
      {"swiglu", Activation::kSilu, true}, {"geglu", Activation::kGelu, true}};
  const Choice* chosen = nullptr;
  std::string names;
  for (const Choice& choice : kChoices) {
    if (activation_name == choice.name) chosen = &choice;
    names += (names.empty() ? "" : ", ") + std::string(choice.name);
  }
  if (chosen == nullptr) {
    bad_value(op, ": activation is '", activation_name, "'; allowed: ", names);
  }
  activation = chosen->activation;
  gated = chosen->gated;
  check_dim(op, "x", x, "T, H");
  check_dtype(op, "x", x, kFloats);
  check_dim(op, "weights", weights, "T, K");
  check_dtype(op, "weights", weights, {wide_dtype(x.scalar_type())}, "for this x");
  check_size(op, "weights", "T", weights.size(0), x.size(0), "as x");
  check_between(op, "T*K", weights.numel(), 0, INT32_MAX, "slots are int32");
  check_dim(op, "slots", slots, "T*K");
  check_dtype(op, "slots", slots, {ScalarType::Int});
  check_size(op, "slots", "T*K", slots.size(0), weights.numel(), "T times K of weights");
  check_dim(op, "w_out", w_out, "L, H, F");
  check_dtype(op, "w_out", w_out, {x.scalar_type()}, "as x");
  check_size(op, "w_out", "H", w_out.size(1), x.size(1), "as x");
  check_dim(op, "w_in", w_in, "L, F, H");
  check_dtype(op, "w_in", w_in, {x.scalar_type()}, "as x");
  check_size(op, "w_in", "L", w_in.size(0), w_out.size(0), "as w_out");
  if (gated) {
    const std::string why = activation_name + ", as w_out";
    check_size(op, "w_in", "2F", w_in.size(1), 2 * w_out.size(2), why.c_str());
  } else {
    check_size(op, "w_in", "F", w_in.size(1), w_out.size(2), "as w_out");
  }
  check_size(op, "w_in", "H", w_in.size(2), x.size(1), "as x");
  if (b_out.has_value()) {
    check_dim(op, "b_out", *b_out, "L, H");
    check_dtype(op, "b_out", *b_out, {x.scalar_type()}, "as x");
    check_size(op, "b_out", "L", b_out->size(0), w_out.size(0), "as w_out");
    check_size(op, "b_out", "H", b_out->size(1), x.size(1), "as x");
    b_out = closed(*b_out);
  }
  check_dim(op, "offsets", offsets, "L+1");
  check_dtype(op, "offsets", offsets, {ScalarType::Int});
  check_size(op, "offsets", "L+1", offsets.size(0), w_out.size(0) + 1, "L of w_out plus 1");
  x = with_closed_rows(x);
}

FfnPlan::FfnPlan(const FfnArguments& a, int64_t depth, int64_t parts)
    : bounds(read_bounds(a)), weights(nullptr, &std::free) {
  const bool ordered = read_rows(a, *this);
  const int64_t count = chunk_count(a, *this, ordered);
  std::vector<int64_t> next(bounds.begin(), bounds.end() - 1);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t begin = a.tokens() * c / count, end = a.tokens() * (c + 1) / count;
    chunks.push_back({static_cast<int64_t>(blocks.size()), 0, begin, end - begin});
    for (int64_t e = 0; e < a.experts(); ++e) {
      const int32_t* const token = tokens.data();
      const int64_t low = next[e];
      const int64_t high = c + 1 == count
                               ? bounds[e + 1]
                               : std::lower_bound(token + low, token + bounds[e + 1], end) - token;
      next[e] = high;
      if (high == low) continue;
      const int64_t cuts = ceil_div(high - low, kBlockRows);
      const int64_t each = ceil_div(ceil_div(high - low, cuts), kPanelRows) * kPanelRows;
      for (int64_t row = low; row < high; row += each) {
        const int64_t here = std::min(each, high - row);
        blocks.push_back({e, row, here, rows(e), panel_bytes});
        panel_bytes += kernels().ffn_panel_bytes(a.dtype(), here, depth, parts);
      }
    }
    chunks.back().blocks = static_cast<int64_t>(blocks.size()) - chunks.back().first_block;
  }
}

std::vector<BlockTask> cut_columns(const std::vector<FfnBlock>& blocks, int64_t columns,
                                   int64_t step) {
  std::vector<BlockTask> tasks;
  if (blocks.empty()) return tasks;
  const int64_t count = static_cast<int64_t>(blocks.size());
  const int64_t enough =
      (few_rows(blocks) ? kFewTasksPerThread : kTasksPerThread) * torch::stable::get_num_threads();
  const int64_t steps = ceil_div(columns, step);
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(enough, count), 1, std::max<int64_t>(steps, 1));
  const int64_t wide = ceil_div(steps, parts) * step;
  for (int64_t block = 0; block < count; ++block) {
    for (int64_t column = 0; column < columns; column += wide) {
      tasks.push_back({block, column, std::min(wide, columns - column)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [&](const BlockTask& a, const BlockTask& b) {
    return blocks[a.block].rows * a.columns > blocks[b.block].rows * b.columns;
  });
  return tasks;
}

std::vector<FfnOutTask> cut_merge(const FfnPlan& plan, int64_t columns) {
  // The width that keeps the busiest thread's columns fewest; wide slabs read the rows less often.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = static_cast<int64_t>(plan.chunks.size());
  const int64_t widest = few_rows(plan.blocks) ? kFewColumns : kSlabColumns;
  const int64_t fewest = std::max<int64_t>(1, ceil_div(columns, widest));
  int64_t best = widest;
  double least = -1;
  for (int64_t parts = fewest; parts <= 2 * fewest + threads; ++parts) {
    const int64_t wide =
        ceil_div(ceil_div(std::max<int64_t>(columns, 1), parts), kColumnStep) * kColumnStep;
    const int64_t tasks = ceil_div(columns, wide) * chunks;
    const double load = static_cast<double>(ceil_div(tasks, threads) * wide) *
                        (1.0 + 4.0 / static_cast<double>(wide));
    if (least < 0 || load < least) {
      least = load;
      best = wide;
    }
  }
  std::vector<FfnOutTask> tasks;
  for (const Chunk& chunk : plan.chunks) {
    for (int64_t column = 0; column < columns; column += best) {
      tasks.push_back({plan.blocks.data() + chunk.first_block, chunk.blocks, chunk.first_token,
                       chunk.tokens, column, std::min(best, columns - column)});
    }
  }
  return tasks;
}

}  // namespace ppmoe::expert_slice
