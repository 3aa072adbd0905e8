"""Every product of the expert layer compiled for GPUs that are not here; see `triton_aids.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_aids import MATRIX_INSTRUCTIONS, TARGETS, compile_launch, usage_of

from ppmoe_ops.kernels._launch import Config, Gpu, Launch, column
from ppmoe_ops.kernels.expert_slice import configs, ffn_combine, ffn_sums, grouped_linear, tiles
from ppmoe_ops.kernels.expert_slice import expert_ffn as forward
from ppmoe_ops.kernels.expert_slice import expert_ffn_backward as backward
from ppmoe_ops.kernels.expert_slice.ffn_weight_gradient import weight_gradient_launch

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, TOP_K, HIDDEN, WIDTH = 128, 8, 2048, 768
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
LOADS = ("few", "some", "many", "plain", "unaligned")
# Spilt bytes: at 255 registers, a few words of an epilogue, once a tile.
STACK_LIMIT = 96
PRODUCTS = {
    "into": configs.INTO,
    "out of": configs.OUT_OF,
    "activation gradient": configs.ACTIVATION_GRADIENT,
    "weight gradient": configs.FFN_WEIGHT_GRADIENT,
}
SMALL = ("plan", "combine", "bias dots", "weight sums", "bias sums")


def launch_of(
    kind: str,
    dtype: torch.dtype,
    config: Config,
    gpu: Gpu,
    odd: int = 0,
    activation: str = "swiglu",
) -> Launch:
    """A launch on tensors without memory, of the shape of a real model, `odd` wider."""
    hidden, width, tokens = HIDDEN + odd, WIDTH + odd, 4096
    rows = tokens * TOP_K

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    slots, offsets = empty(rows, of=torch.int32), empty(EXPERTS + 1, of=torch.int32)
    plan = tiles.empty_plan(slots, offsets, rows, config.block_m or 128)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, pre, act = empty(tokens, hidden), empty(rows, 2 * width), empty(rows, width)
    w_in, w_out = empty(EXPERTS, 2 * width, hidden), empty(EXPERTS, hidden, width)
    b_in, b_out = empty(EXPERTS, 2 * width), empty(EXPERTS, hidden)
    scale, dots = empty(tokens, TOP_K, of=wide), empty(7, rows, of=wide)
    if kind == "into":
        return forward.into_experts_launch(
            plan, x, w_in, b_in, pre, act, TOP_K, activation, config, gpu
        )
    if kind == "out of":
        out = empty(rows, hidden)
        return forward.out_of_experts_launch(plan, act, w_out, b_out, scale, out, config, gpu)
    if kind == "activation gradient":
        return backward.activation_gradient_launch(
            plan, x, scale, w_out, pre, pre, act, dots, activation, config, gpu
        )
    if kind == "weight gradient":
        return weight_gradient_launch(plan, pre, x, w_in, TOP_K, False, config)
    if kind == "linear":
        return grouped_linear.linear_launch(
            x, offsets, w_in, b_in, empty(tokens, 2 * width), config
        )
    if kind == "plan":
        return tiles.plan_launch(plan)
    if kind == "combine":
        return ffn_combine.combine_launch(plan, act, empty(tokens, width), TOP_K)
    if kind == "bias dots":
        return ffn_sums.bias_dots_launch(plan, x, b_out, dots[-1], TOP_K, configs.DOTS)
    if kind == "weight sums":
        return ffn_sums.weight_sums_launch(plan, dots, scale)
    return ffn_sums.bias_sums_launch(plan, x, scale, b_out, TOP_K)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """One line for each kernel; printed and kept under reports/ at the end."""
    lines = [
        f"{'kernel':20} {'dtype':8} {'load':9} {'target':6} {'regs':>4} {'shared':>7} {'stack':>5}"
        "  instruction"
    ]
    yield lines
    text = "\n".join(lines)
    print(text)
    (ROOT / "reports").mkdir(exist_ok=True)
    (ROOT / "reports" / "triton_ffn_resources.txt").write_text(text + "\n")


def cases() -> Iterator[tuple[str, torch.dtype, str, int]]:
    for kind in PRODUCTS:
        for capability in TARGETS:
            for dtype in DTYPES:
                # float16 differs from bfloat16 in one letter of the product's instruction.
                loads = ("many", "plain") if dtype in (torch.float16, torch.float64) else LOADS
                # "plain" is "many" of devices without a copy engine; both share it in wider types.
                skipped = "plain" if capability >= 90 or dtype.itemsize > 2 else "many"
                yield from ((kind, dtype, each, capability) for each in loads if each != skipped)


@pytest.mark.parametrize(("kind", "dtype", "load", "capability"), list(cases()))
def test_products_fit_and_do_not_spill(
    kind: str, dtype: torch.dtype, load: str, capability: int, table: list[str], tmp_path: Path
) -> None:
    config = column(PRODUCTS[kind], dtype.itemsize, load)
    gpu = Gpu(132, capability >= 90)
    launch = launch_of(kind, dtype, config, gpu, odd=2 if load == "unaligned" else 0)
    compiled = compile_launch(launch, capability)
    usage = usage_of(compiled, tmp_path)
    text = compiled.asm["ptx"]
    found = MATRIX_INSTRUCTIONS.search(text)
    table.append(
        f"{kind:20} {str(dtype)[6:]:8} {load:9} sm_{capability:<3} {usage.registers:4} "
        f"{usage.shared:7} {usage.stack:5}  {found.group(1) if found else '-'}"
    )
    assert usage.shared <= TARGETS[capability]
    assert usage.stack <= STACK_LIMIT
    if dtype.itemsize == 2:
        assert found is not None
        if capability == 90 and load in ("some", "many"):
            assert found.group(1) == "wgmma.mma_async"
        if capability >= 90 and load != "unaligned" and kind != "weight gradient":
            assert "cp.async.bulk.tensor" in text
    assert "tf32" not in text


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("load", ["few", "little"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_fit_devices_with_little_shared_memory(
    kind: str, load: str, capability: int, tmp_path: Path
) -> None:
    """Consumer devices have 99 KiB a program, with a copy engine or without."""
    config = column(PRODUCTS[kind], 2, load)
    launch = launch_of(kind, torch.bfloat16, config, Gpu(84, capability >= 90, 99 * 1024))
    usage = usage_of(compile_launch(launch, capability), tmp_path)
    assert usage.shared <= 99 * 1024
    assert usage.stack <= STACK_LIMIT


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("kind", SMALL)
def test_small_kernels(kind: str, capability: int, table: list[str], tmp_path: Path) -> None:
    launch = launch_of(kind, torch.bfloat16, configs.OUT_OF[2]["many"], Gpu(132, capability >= 90))
    usage = usage_of(compile_launch(launch, capability), tmp_path)
    table.append(
        f"{kind:20} {'bfloat16':8} {'-':9} sm_{capability:<3} {usage.registers:4} "
        f"{usage.shared:7} {usage.stack:5}  -"
    )
    assert usage.stack == 0
    assert usage.registers <= 128


def test_hopper_splits_warps_where_it_is_asked_for(tmp_path: Path) -> None:
    """Only where every operand comes by the copy engine: a gather does not."""
    config = configs.OUT_OF_SPECIALIZED
    compiled = compile_launch(launch_of("out of", torch.bfloat16, config, Gpu(132, True)), 90)
    assert "setmaxnreg" in compiled.asm["ptx"]
    assert usage_of(compiled, tmp_path).stack == 0
    plain = launch_of("out of", torch.bfloat16, config, Gpu(132, False))
    assert not plain.arguments["SPECIALIZE"]


@pytest.mark.parametrize("kind", [*PRODUCTS, *SMALL])
def test_addresses_are_64_bit(kind: str) -> None:
    config = configs.OUT_OF[2]["many"] if kind in SMALL else PRODUCTS[kind][2]["many"]
    compiled = compile_launch(launch_of(kind, torch.bfloat16, config, Gpu(132, False)), 90)
    operands = r"tt\.addptr %\S+, %\S+ : \S*!tt\.ptr<(\w+)>+, (?:tensor<[\dx]+)?(\w+)"
    steps = re.findall(operands, compiled.asm["ttir"])
    assert len(steps) == compiled.asm["ttir"].count("tt.addptr")
    # Slots, offsets and the plan have at most 2**31 elements; so has scale, indexed by a slot.
    narrow = {element for element, index in steps if index != "i64"}
    assert narrow <= {"i32", "f32"}, kind


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "geglu"])
def test_every_activation_compiles_without_spills(activation: str, tmp_path: Path) -> None:
    for kind in ("into", "activation gradient"):
        config = PRODUCTS[kind][2]["many"]
        launch = launch_of(kind, torch.bfloat16, config, Gpu(132, True), activation=activation)
        assert usage_of(compile_launch(launch, 90), tmp_path).stack <= STACK_LIMIT, kind


def candidates() -> Iterator[tuple[str, int, str, Config]]:
    for kind, sizes in configs.CANDIDATES.items():
        for size, loads in sizes.items():
            for load, each in loads.items():
                yield from ((kind, size, load, config) for config in each)


@pytest.mark.parametrize(("kind", "size", "load", "config"), list(candidates()))
def test_what_the_tuner_tries_fits_and_does_not_spill(
    kind: str, size: int, load: str, config: Config, tmp_path: Path
) -> None:
    capability = 80 if load == "plain" else 90
    dtype = torch.bfloat16 if size == 2 else torch.float32
    launch = launch_of(kind, dtype, config, Gpu(132, capability >= 90))
    usage = usage_of(compile_launch(launch, capability), tmp_path)
    assert usage.stack <= STACK_LIMIT
    assert usage.shared <= TARGETS[capability]
    # A multiprocessor has 64 Ki registers, and 1 KiB of shared memory is lost to each program.
    assert config.programs * usage.registers * config.num_warps * 32 <= 1 << 16
    assert config.programs * (usage.shared + 1024) <= TARGETS[capability] + 1024


def test_what_the_tuner_tries_shares_the_plan_with_the_table() -> None:
    tables = {**PRODUCTS, "linear": configs.LINEAR}
    assert set(configs.CANDIDATES) == set(tables)
    tried: dict[tuple[str, int, str], list[Config]] = {}
    for kind, size, load, config in candidates():
        entry = column(tables[kind], size, load)
        assert config.block_m == entry.block_m
        # By its tiles' columns the dots of the routing weights are laid out.
        assert kind != "activation gradient" or config.block_n == entry.block_n
        tried.setdefault((kind, size, load), [entry]).append(config)
    assert all(len(set(each)) == len(each) for each in tried.values())
