"""Bugs in matrix products: packing, the micro-kernel, `grouped_linear`."""

from __future__ import annotations

from mutations.mutation import CPU, INCLUDE, SHARED, mutations

PRODUCTS = (
    *mutations(
        f"{SHARED}/gemm.cpp", "test_grouped_linear", "gemm",
        ("j < n; ++j) to[j] = narrow<T>(from[j]);", "j + 1 < n; ++j) to[j] = narrow<T>(from[j]);",
         "last of a product's row"),
    ),
    *mutations(
        f"{SHARED}/gemm.cpp", "test_grouped_linear", "column_sums",
        ("total[c] += part[c];", "total[c] = part[c];", "the last strip alone"),
    ),
    *mutations(
        f"{SHARED}/gemm.cpp", "test_expert_ffn", "column_sums",
        ("part[c] += weight * to_float(row[c", "part[c] += to_float(row[c", "no weights"),
        ("load_wide(part + c) + weight * load_wide(row + c)",
         "load_wide(part + c) + load_wide(row + c)", "no weights in whole vectors"),
    ),
    *mutations(
        f"{SHARED}/gemm_kernel.cpp", "test_grouped_linear", "gemm",
        ("cell = add ? cell + total[i][j] : total[i][j];", "cell = total[i][j];",
         "the last chain alone"),
        ("depth != 0 || step != 0, ahead", "depth != 0, ahead", "a slab's last chain alone"),
        ("rest = d; rest < k; ++rest", "rest = d; rest + 1 < k; ++rest", "last of a thin sum"),
        ("if (k == 0 && !add) {", "if (k < 0) {", "empty sums unwritten"),
    ),
    *mutations(
        f"{SHARED}/gemm_kernel.cpp", "test_expert_ffn", "ffn_in ffn_in_backward ffn_out",
        ("least(first + columns, low + kDepth) - d;", "first + columns - d;",
         "packed past the end of a depth"),
        ("at(row, low) + (d - low) * width);", "at(row, low));", "columns packed over the first"),
        ("add || depth != 0 || step", "depth != 0 || step", "the last half's product alone"),
    ),
    *mutations(
        f"{SHARED}/gemm_kernel.cpp", "test_expert_ffn_bits", "gemm ffn_in ffn_in_backward ffn_out",
        ("chain_steps<S>(group);", "chain_steps<S>(m);", "chains as long as a block is tall"),
    ),
    *mutations(
        f"{INCLUDE}/gemm.h", "test_grouped_linear", "gemm",
        ("v += load_wide(bias + j);", "v -= load_wide(bias + j);", "sign of the bias"),
        ("from[j] + wide_t<T>(to_float(bias[j]))", "from[j]", "no bias at a row's end"),
        ("data + d * rows + row * padded(d)", "data + row * padded(d)",
         "the first slab of a again"),
        (" && b_depth.closed();", ";", "thin products of spread weights"),
        ("a_depth.closed() && ", "", "thin products of spread rows"),
    ),
    *mutations(
        f"{INCLUDE}/gemm.h", "test_expert_ffn", "ffn_in",
        ("shifted.data += i * part;", "", "the gate's columns again"),
    ),
    *mutations(
        f"{INCLUDE}/pack.h", "test_grouped_linear", "gemm",
        ("t[i + 1] = unpack_high(r[i], r[i + 1]);", "t[i + 1] = unpack_low(r[i], r[i + 1]);",
         "half of a transpose"),
        ("for (int64_t i = 0; i < count; ++i) part[i] = line[i];",
         "for (int64_t i = 0; i + 1 < count; ++i) part[i] = line[i];", "last of a line"),
        ("(low | high << 16)", "(high | low << 16)", "pairs the other way round"),
        ("for (int64_t i = 0; i < here; ++i) part[0][i] = line[i];",
         "for (int64_t i = 1; i < here; ++i) part[0][i] = line[i];", "first of the last lines"),
    ),
    *mutations(
        f"{INCLUDE}/pack.h", "test_expert_ffn", "ffn_in ffn_in_backward",
        ("axis.index += by;", "", "the first tokens in every panel"),
    ),
    *mutations(
        f"{CPU}/gemm_ops.cpp", "test_grouped_linear", "",
        ("std::fill_n(data<char>(out), bounds.front() * bytes, 0);", "", "rows before the first"),
        ("(out.size(0) - bounds.back()) * bytes, 0);", "0, 0);", "rows after the last"),
        ("at(*bias, block.expert * width + block.column)", "at(*bias, block.column)",
         "the first expert's bias"),
        ("const int64_t low = bounds[block.expert];", "const int64_t low = bounds[0];",
         "the first expert's rows"),
        ("width, at(grad_bias, e * width)", "width, at(grad_bias, 0)", "one gradient of bias"),
    ),
    *mutations(
        f"{CPU}/gemm_ops.cpp", "test_bad_input", "",
        ("bound[i] < 0 || bound[i] > rows", "bound[i] < 0 || bound[i] > rows + 1",
         "a row too many"),
    ),
)  # fmt: skip
