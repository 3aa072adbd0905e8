"""The one list of sources and flags; `build.py` makes the build from it."""

from __future__ import annotations

from pathlib import Path

CSRC = Path(__file__).resolve().parent

# Torch 2.11 is the oldest torch whose stable ABI the libraries use; they load on every later one.
STABLE_ABI_TARGET = "0x020b000000000000"

CPU_OPS = (
    "cpu/capability.cpp",
    "cpu/expert_slice.cpp",
    "cpu/expert_slice/router_ops.cpp",
    "cpu/expert_slice/rows_ops.cpp",
    "cpu/expert_slice/gemm_ops.cpp",
    "cpu/expert_slice/ffn_plan.cpp",
    "cpu/expert_slice/ffn_ops.cpp",
    "cpu/expert_slice/ffn_backward_ops.cpp",
    "cpu/ladder_attention.cpp",
    "cpu/ladder_attention/attention_ops.cpp",
    "cpu/ladder_attention/block_ops.cpp",
    "cpu/ladder_attention/block_plan.cpp",
    "cpu/ladder_attention/branch_ops.cpp",
    "cpu/ladder_attention/ffn_ops.cpp",
    "cpu/ladder_attention/ffn_backward_ops.cpp",
    "cpu/ladder_attention/fusion_ops.cpp",
    "cpu/equilibrium.cpp",
    "cpu/equilibrium/cell_ops.cpp",
    "cpu/equilibrium/conv_backward_ops.cpp",
    "cpu/equilibrium/conv_ops.cpp",
    "cpu/equilibrium/conv_solve.cpp",
    "cpu/equilibrium/mix_ops.cpp",
)
CPU_KERNELS = (
    "cpu/expert_slice/route.cpp",
    "cpu/expert_slice/route_f64.cpp",
    "cpu/expert_slice/route_backward.cpp",
    "cpu/expert_slice/losses.cpp",
    "cpu/expert_slice/index.cpp",
    "cpu/expert_slice/rows.cpp",
    "cpu/shared/gemm_kernel.cpp",
    "cpu/shared/gemm.cpp",
    "cpu/shared/tile.cpp",
    "cpu/expert_slice/ffn.cpp",
    "cpu/expert_slice/ffn_backward.cpp",
    "cpu/expert_slice/table.cpp",
    "cpu/ladder_attention/attention.cpp",
    "cpu/ladder_attention/attention_backward.cpp",
    "cpu/ladder_attention/branch.cpp",
    "cpu/ladder_attention/ffn.cpp",
    "cpu/ladder_attention/ffn_backward.cpp",
    "cpu/ladder_attention/ffn_gradients.cpp",
    "cpu/ladder_attention/fusion.cpp",
    "cpu/ladder_attention/fusion_backward.cpp",
    "cpu/ladder_attention/fusion_gradient.cpp",
    "cpu/ladder_attention/table.cpp",
    "cpu/equilibrium/cell.cpp",
    "cpu/equilibrium/cell_newton.cpp",
    "cpu/equilibrium/cell_backward.cpp",
    "cpu/equilibrium/conv_adjoint.cpp",
    "cpu/equilibrium/conv_f.cpp",
    "cpu/equilibrium/conv_gradients.cpp",
    "cpu/equilibrium/mix.cpp",
)
HOST_SOURCES = ("host/host.cpp", "cpu/capability.cpp")
CUDA_SOURCES = tuple(str(path.relative_to(CSRC)) for path in sorted((CSRC / "cuda").rglob("*.cu")))

# Every kernel source is compiled once for each of these; the best one that the CPU has is chosen at
# run time (csrc/include/ppmoe/capability.h). Later ones contain earlier ones.
X86_ISAS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512_bf16": ("-mavx512bf16",),
}
CXX_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
)
# GCC 12 warns inside its own AVX-512 header (its bug 105593).
KERNEL_FLAGS = ("-O3", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
OPS_FLAGS = ("-O2",)
SANITIZE_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined")
CUDA_FLAGS = (
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-cudart=static",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
)
CUDA_ARCHS = ("8.0", "9.0a", "10.0+PTX")
