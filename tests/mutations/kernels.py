"""Bugs in routing, losses, indices, rows and what all kernels share."""

from __future__ import annotations

from mutations.mutation import CPU, mutations

KERNELS = (
    *mutations(
        f"{CPU}/route.cpp", "test_route", "route",
        ("splat(-kInfinity)) + 0.f;", "splat(-kInfinity));", "-0 ranks below +0"),
        ("(x == x ? x : splat(-kInfinity))", "(x == x ? x : splat(kInfinity))", "NaN ranks first"),
        ("larger(v[i], w[D - 1 - i])", "larger(v[i], w[i])", "lists are merged the same way round"),
        ("descend(v[i], v[D - 1 - i]);", "descend(v[i], v[i + D / 2]);", "a wrong sorting network"),
        ("k > 0 && best[k - 1] < keys[i]", "k > 1 && best[k - 1] < keys[i]", "one place too few"),
        ("if (top_k <= 8) return", "if (top_k <= 9) return", "nine from lists of eight"),
        ("(x < 0.f ? e : splat(1.f))", "(x < 0.f ? splat(1.f) : e)", "sigmoid of -x"),
        ("load<VecF>(score + i) / all)", "load<VecF>(score + i))", "softmax without its sum"),
        ("next = max(next, x < high ? x : high);", "next = max(next, x);", "the best one twice"),
        ("rank[g] && other < g)", "rank[g] && other > g)", "equal groups go to the higher"),
        ("if (better < top_groups)", "if (better <= top_groups)", "a group more"),
        ("return any(nan) || top ==", "return top ==", "NaN that was not selected is missed"),
        ("= static_cast<float>(scale / total);", "= static_cast<float>(1 / total);", "no scale"),
        ("i < padded; ++i) row[i] = -kInfinity;", "i < padded; ++i) row[i] = 0.f;", "padding of 0"),
        ("double total = kSigmoidSumFloor;", "double total = 0;", "zero divided by zero"),
        ("score[i] + bias[i] : score[i]", "score[i] - bias[i] : score[i]", "bias subtracted"),
    ),
    *mutations(
        f"{CPU}/route_f64.cpp", "test_route", "route",
        ("(a == b && a_id < b_id)", "(a == b && a_id > b_id)", "ties go to the higher id"),
        ("weights[k] * a.scale;", "weights[k];", "no scale"),
        ("size == 1 ? first : first + second", "first", "a group counts by its best one"),
        ("a.scale / (total + kSigmoidSumFloor)", "a.scale / total", "zero divided by zero"),
    ),
    *mutations(
        f"{CPU}/route_backward.cpp", "test_route", "route_backward",
        ("static_cast<W>(-mean * a.scale)", "static_cast<W>(mean * a.scale)",
         "sign of the unselected"),
        ("(grad[k] - mean) * a.scale", "(grad[k] - mean)", "no scale on the selected"),
        ("weights[k] * (grad[k] - mean)", "weights[k] * (grad[k] + mean)", "sign of the mean"),
        ("mean *= unscale;", "", "mean of scaled weights"),
        ("sigmoid.score * sigmoid.rest", "sigmoid.score * sigmoid.score", "derivative of sigmoid"),
        ("rest = x < 0 ? larger : smaller;", "rest = x < 0 ? smaller : larger;", "1 - s swapped"),
        ("static_cast<size_t>(a.experts) * sizeof(T));", "0);", "unselected are not written"),
    ),
    *mutations(
        f"{CPU}/losses.cpp", "test_router_losses", "losses",
        ("experts - whole, lowest);", "experts - whole, W(0));", "padding of 0"),
        ("static_cast<double>(lse) * static_cast<double>(lse)", "static_cast<double>(lse)",
         "z is not squared"),
        ("store(mass + i, load<V>(mass + i) + p);", "store(mass + i, p);", "mass of the last row"),
        ("if (top - top != 0 && !has_nan(row, experts)) lse = top;", "", "NaN for an infinity"),
    ),
    *mutations(
        f"{CPU}/losses.cpp", "test_router_losses", "losses_backward",
        ("* lse - balance * sum(dot)", "* lse + balance * sum(dot)", "sign of the mean share"),
        ("V dot = part * part_shares;", "V dot{};", "the row's end has no share"),
    ),
    *mutations(
        f"{CPU}/index.cpp", "test_expert_index", "count place",
        ("distance < 0xffffffffu ? static_cast<uint32_t>(distance) : 0xffffffffu",
         "static_cast<uint32_t>(distance)", "64-bit ids are cut to 32 bits"),
        ("a.local < most ? a.local : most", "a.local < most ? a.local : a.local",
         "ids wrap around past int32"),
    ),
    *mutations(
        f"{CPU}/index.cpp", "test_expert_index", "place",
        ("if (to + i >= stream.first) to[i]", "to[i]", "a line overwrites its neighbour's slots"),
        ("if (place == kLine - 1) flush", "if (place == kLine - 2) flush", "lines one slot short"),
        ("place_ids<int64_t>(a, begin, end, streams)", "place_ids<int32_t>(a, begin, end, streams)",
         "int64 ids read as int32"),
    ),
    *mutations(
        f"{CPU}/rows.cpp", "test_rows", "slice",
        ("      if (to >= 0)\n", "      if (to > 0)\n", "the first row is not written"),
        ("for (; at < bytes; ++at) to[at]", "for (; at + 1 < bytes; ++at) to[at]",
         "the last byte of a streamed row"),
    ),
    *mutations(
        f"{CPU}/rows.cpp", "test_rows", "slice_clear",
        ("if (a.slots[i] >= 0) continue;", "if (a.slots[i] > 0) continue;", "slot 0 is cleared"),
    ),
    *mutations(
        f"{CPU}/rows.cpp", "test_rows", "merge",
        ("total[v] += load_wide(row + v * lanes) * w;", "total[v] += load_wide(row + v * lanes);",
         "no weights"),
        ("total += W(to_float(value)) *", "total -= W(to_float(value)) *", "sign of a row's end"),
    ),
    *mutations(
        f"{CPU}/rows.cpp", "test_rows", "merge_backward",
        ("dot[v] += g * load_wide(rows", "dot[v] = g * load_wide(rows", "the last block's product"),
        ("grad_weights[slot] = total;", "grad_weights[slot] = -total;", "sign"),
        ("scaled[v] = g * weight;", "scaled[v] = g;", "no weight"),
        ("out[i] = narrow<T>(g * weight);", "out[i] = narrow<T>(g);", "no weight at a row's end"),
        ("slot / a.top_k * a.grad_stride", "slot % a.top_k * a.grad_stride", "another token"),
    ),
    *mutations(
        f"{CPU}/rows_ops.cpp", "test_expert_index", "",
        (" + table[3 * num_local];", ";", "a quarter is not counted"),
        ("std::fill(first + running, first + count, -1);", "", "the tail is not written"),
    ),
    *mutations(
        f"{CPU}/rows_ops.cpp", "test_bad_input", "",
        ("if (row >= 0) bad_value", "if (row > 0) bad_value", "row 0 may be listed twice"),
        ("slot[i] < -1 || slot[i] >= count", "slot[i] < -1 || slot[i] > count",
         "a slot too many"),
    ),
    *mutations(
        f"{CPU}/rows_ops.cpp", "test_rows", "",
        ("std::fill_n(data<char>(grad_weights), count * weights.element_size(), 0);", "",
         "weights of foreign slots have no gradient"),
    ),
    *mutations(
        f"{CPU}/router_ops.cpp", "test_router_losses", "",
        ("scalar(grad_z) * 2 / rows", "scalar(grad_z) / rows", "half of the gradient of z"),
        ("(tokens + kLossBlock - 1) / kLossBlock", "tokens / kLossBlock", "the last rows"),
        ("all > 0 ? all : 1", "all > 0 ? tokens : 1", "shares of tokens and not of choices"),
    ),
    *mutations(
        f"{CPU}/router_ops.cpp", "test_bad_input", "",
        ("1, top_groups * (experts / groups)", "1, experts", "more than the groups hold"),
    ),
    *mutations(
        "csrc/include/ppmoe/vec.h", "test_route", "",
        ("q = q * r + 1.666652113e-01f;", "q = q * r + 1.666052113e-01f;", "a coefficient of exp"),
    ),
    *mutations(
        "csrc/include/ppmoe/vec.h", "test_rows", "",
        ("rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (VecU{} + 0x7fc0u) : rounded;", "",
         "some NaN round to zero"),
    ),
    *mutations(
        "csrc/include/ppmoe/check.h", "test_bad_input", "",
        ("if (came < low || came > high) {", "if (came < low) {", "no upper bounds"),
    ),
)  # fmt: skip
