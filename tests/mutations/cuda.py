"""Bugs in the CUDA kernels, caught where these run on the CPU from their own source."""

from __future__ import annotations

from mutations.mutation import Mutation

CUDA = "csrc/cuda/expert_slice"


def _cuda(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = f"tests/compile/{tests}.py"
    return tuple(Mutation(f"{CUDA}/{file}", *change, selection) for change in changes)


CUDA_KERNELS = (
    *_cuda(
        "route_keys.cuh", "test_cuda_emulated_route",
        ("x == x ? x + 0.f :", "x == x ? x :", "-0 ranks below +0"),
        ("(i - k % p) / k % 2 == 0", "(i - k % p) / k % 2 == 1", "a wrong sorting network"),
        ("threadIdx.x % 32 / kLanes * kLanes;", "0;", "NaN of a neighbouring token"),
        ("exponential(x < 0 ? x : -x)", "exponential(x < 0 ? -x : x)", "logistic overflows"),
    ),
    *_cuda(
        "route_row.cuh", "test_cuda_emulated_route",
        ("bits == 0x8000u ? 0u : bits;", "bits;", "-0 of 16 bits ranks below +0"),
        ("half ? 0x7c00u : 0x7f80u", "half ? 0x7f80u : 0x7f80u", "NaN of float16 is a number"),
        ("poisoned ? bits_of<float>(0x7fc00000u) : weight *", "weight *",
         "NaN that was not selected is missed"),
        ("won ? key[i + 1] : key[i];", "won ? key[i] : key[i];", "a lane wins again and again"),
        ("fmaxf(second, fminf(best, x));", "fmaxf(second, x);", "the best one twice"),
        ("rank[g] && other < g)", "rank[g] && other > g)", "equal groups go to the higher"),
        ("inside + 1 == size ? 0", "inside + 2 == size ? 0", "experts of the next group"),
        ("const int64_t t = token < a.tokens ? token : a.tokens - 1;\n  const int experts = "
         "a.experts;\n  const int first = lane * N;\n  const bool half = a.type == "
         "LogitType::kHalf;\n\n  uint16_t",
         "const int64_t t = token < a.tokens ? token : 0;\n  const int experts = "
         "a.experts - 1;\n  const int first = lane * N;\n  const bool half = a.type == "
         "LogitType::kHalf;\n\n  uint16_t", "the last expert is never chosen"),
    ),
    *_cuda(
        "route_any.cuh", "test_cuda_emulated_route",
        ("score == other.score && id < other.id", "score == other.score && id > other.id",
         "ties go to the higher id"),
        ("total += row.total - row.total;", "total += 0;", "NaN that was not selected is missed"),
        ("factor * scale;", "factor;", "no scale"),
    ),
    *_cuda(
        "route.cu", "test_cuda_emulated_route",
        ("top_k > kRowChoices", "top_k > 2 * kRowChoices", "more choices than lanes"),
        ("1, top_groups * (experts / groups)", "1, experts", "more than the groups hold"),
    ),
    *_cuda(
        "route_backward.cu", "test_cuda_emulated_route",
        ("static_cast<W>(-mean * a.scale)", "static_cast<W>(mean * a.scale)",
         "sign of the unselected"),
        ("weights[k] * (grad[k] - mean);", "weights[k] * (grad[k] + mean);", "sign of the mean"),
        ("logistic(x) * logistic(-x)", "logistic(x) * logistic(x)", "derivative of sigmoid"),
        ("return static_cast<unsigned>(id) < static_cast<unsigned>(experts);",
         "return id < experts;", "a negative id is written to"),
    ),
    *_cuda(
        "router_losses.cu", "test_cuda_emulated_route",
        ("if (top - top != 0 && !any_nan) lse = top;", "", "NaN for an infinity"),
        ("if (first > 0) continue;", "", "squares once for every piece of the experts"),
        ("static_cast<uint64_t>(id) - static_cast<uint64_t>(low);",
         "static_cast<uint64_t>(static_cast<uint32_t>(id)) - static_cast<uint64_t>(low);",
         "64-bit ids are cut to 32 bits"),
        ("for (int b = warp; b < blocks; b += kParts)",
         "for (int b = warp; b + 1 < blocks; b += kParts)", "the last block of rows"),
    ),
    *_cuda(
        "router_losses_backward.cu", "test_cuda_emulated_route",
        ("z * lse - balance * mean", "z * lse + balance * mean", "sign of the mean share"),
        ("static_cast<W>(2.0 / rows.size(0))", "static_cast<W>(1.0 / rows.size(0))",
         "half of the gradient of z"),
    ),
    *_cuda(
        "index.cu", "test_cuda_emulated",
        ("ahead[c] += b < block ? count : 0;", "ahead[c] += b <= block ? count : 0;",
         "a block's own slots are ahead of it"),
        ("const int e = first + 32 * c;\n        const int count",
         "const int e = first + 33 * c;\n        const int count", "counts of another expert"),
        ("peers & ((1u << lane) - 1)", "peers & ~((1u << lane) - 1)", "the sort is not stable"),
    ),
    *_cuda(
        "slice.cu", "test_cuda_emulated",
        ("slot / top_k : -1", "slot % top_k : -1", "another token"),
        ("if (row < count) out", "if (row + 1 < count) out", "the last row is not written"),
    ),
    *_cuda(
        "merge.cu", "test_cuda_emulated",
        ("sum[l] += weight * widen(value[j].lane[l]);", "sum[l] += widen(value[j].lane[l]);",
         "no weights"),
        ("if (local && a.inverse[own] == slot) return;", "if (local) return;",
         "a slot that is listed twice leaves a row unwritten"),
        ("if (valid(slot, count)) atomicMax(&inverse[slot], i);",
         "if (slot < count) atomicMax(&inverse[slot], i);", "a negative slot is written to"),
    ),
)  # fmt: skip
