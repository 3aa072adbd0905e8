"""Arguments of the ladder-attention operators, by name and in the order of the schema."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ladder import Args, Shape, wide
from torch import Tensor

# Parameters that may be float32 beside narrower data.
KEPT = ("bias_table", "ln_w", "ln_b", "bn_w", "bn_b", "running_mean", "running_var", "row_scale")


def tensor(*sizes: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64) * scale + around


def in_dtype(args: Args, dtype: torch.dtype, kept: bool = False) -> Args:
    """Floating-point tensors in `dtype`; with `kept` those of KEPT in the wide one."""
    return {
        name: value.to(wide(dtype) if kept and name in KEPT else dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in args.items()
    }


def table_of(shape: Shape) -> Tensor:
    tall, broad = shape.window
    return tensor((2 * tall - 1) * (2 * broad - 1), shape.heads, scale=0.5)


def attention_args(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale: float | None = None,
    kept: bool = False,
) -> Args:
    q, k, v = (tensor(*shape.map) for _ in range(3))
    args = {
        "q": q, "k": k, "v": v, "bias_table": table_of(shape) if bias else None,
        "num_heads": shape.heads, "window": list(shape.window), "shift": list(shape.shift),
        "scale": scale,
    }  # fmt: skip
    return in_dtype(args, dtype, kept)


def branch_args(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    value: bool = True,
    scaled: bool = False,
    kept: bool = False,
    eps: float = 1e-5,
) -> Args:
    g, parts = shape.channels, 2 if value else 3
    args = {
        "x": tensor(*shape.map), "v": tensor(*shape.map) if value else None,
        "ln_w": tensor(g, scale=0.3, around=1.0), "ln_b": tensor(g, scale=0.3),
        "w_in": tensor(parts * g, g, scale=max(g, 1) ** -0.5), "b_in": tensor(parts * g, scale=0.3),
        "bias_table": table_of(shape), "w_out": tensor(g, g, scale=max(g, 1) ** -0.5),
        "b_out": tensor(g, scale=0.3), "row_scale": rows_of(shape.batch) if scaled else None,
        "num_heads": shape.heads, "window": list(shape.window), "shift": list(shape.shift),
        "eps": eps,
    }  # fmt: skip
    return in_dtype(args, dtype, kept)


def rows_of(batch: int) -> Tensor:
    """Factors of stochastic depth: every other one is zero."""
    return torch.tensor([1.25, 0.0]).repeat(batch)[:batch].double()


def ffn_args(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    scaled: bool = False,
    kept: bool = False,
    running: bool = True,
    eps: float = 1e-5,
) -> Args:
    """`sizes` are those of the map, channels last."""
    batch, _, _, g = sizes
    deep = max(g, 1) ** -0.5
    args = {
        "x": tensor(*sizes), "ln_w": tensor(g, scale=0.3, around=1.0),
        "ln_b": tensor(g, scale=0.3), "w1": tensor(g, g, scale=deep), "b1": tensor(g, scale=0.3),
        "dw_w": tensor(g, 3, 3, scale=0.4), "dw_b": tensor(g, scale=0.3),
        "w2": tensor(g, g, scale=deep), "b2": tensor(g, scale=0.3),
        "bn_w": tensor(3, g, scale=0.3, around=1.0), "bn_b": tensor(3, g, scale=0.3),
        "running_mean": tensor(3, g, scale=0.3) if running else None,
        "running_var": torch.rand(3, g).double() + 0.5 if running else None,
        "row_scale": rows_of(batch) if scaled else None, "training": training, "eps": eps,
    }  # fmt: skip
    return in_dtype(args, dtype, kept)


def fusion_args(
    sizes: tuple[int, ...], hidden: int | None = None, dtype: torch.dtype = torch.float32
) -> Args:
    c = sizes[-1]
    d = c // 2 if hidden is None else hidden
    args = {
        "x": tensor(*sizes), "w1": tensor(d, c, scale=max(c, 1) ** -0.5),
        "b1": tensor(d, scale=0.3), "w2": tensor(c, d, scale=max(d, 1) ** -0.5),
        "b2": tensor(c, scale=0.3), "wp": tensor(c, c, scale=max(c, 1) ** -0.5),
        "bp": tensor(c, scale=0.3),
    }  # fmt: skip
    return in_dtype(args, dtype)


def fold(params: Args) -> list[Tensor]:
    """Nine parameters of a folded second half, from those of `ladder_ffn` in evaluation."""
    rate = params["bn_w"] * (params["running_var"] + params["eps"]).rsqrt()
    offset = params["bn_b"] - params["running_mean"] * rate
    dw_w, w2 = params["dw_w"], params["w2"]
    # Of BN_1 before the second product, and BN_2 behind it.
    behind = w2 * rate[1]
    bias = w2 @ offset[1] + params["b2"]
    return [
        params["ln_w"], params["ln_b"], params["w1"], params["b1"],
        dw_w * rate[0][:, None, None], params["dw_b"], dw_w * offset[0][:, None, None],
        behind * rate[2][:, None], bias * rate[2] + offset[2],
    ]  # fmt: skip


def unfolded_block(shape: Shape) -> tuple[list[Args], list[Args], Args]:
    """In float64 the arguments of the seven operators that a block is made of, maps left out.

    `shape` is that of a branch.
    """
    branches, feeds = [], []
    for at, sign in enumerate((0, 1, -1)):
        branch = branch_args(shape, torch.float64, value=at > 0)
        branch["shift"] = [sign * each for each in shape.shift]
        branches.append(branch)
        feeds.append(ffn_args(shape.map, torch.float64))
    size = (shape.batch, shape.height, shape.width, 3 * shape.channels)
    return branches, feeds, fusion_args(size, dtype=torch.float64)


def block_of(branches: list[Args], feeds: list[Args], fusion: Args, shape: Shape) -> Args:
    names = ("ln_w", "ln_b", "w_in", "b_in", "bias_table", "w_out", "b_out")
    params: list[Tensor] = []
    for branch, feed in zip(branches, feeds, strict=True):
        params += [branch[name] for name in names] + fold(feed)
    params += [fusion[name] for name in ("w1", "b1", "w2", "b2", "wp", "bp")]
    return {
        "x": fusion["x"], "params": params, "num_heads": shape.heads,
        "window": list(shape.window), "shift": list(shape.shift),
    }  # fmt: skip


def block_args(shape: Shape, dtype: torch.dtype = torch.float32) -> Args:
    """`shape` is that of a branch: the block's maps are three times as wide."""
    args = block_of(*unfolded_block(shape), shape)
    return {
        **args, "x": args["x"].to(dtype), "params": [each.to(dtype) for each in args["params"]]
    }  # fmt: skip


def cut(tensor: Tensor, channel: int, count: int) -> Tensor:
    """Channels of a wider map, as a branch gets them."""
    return tensor[..., channel : channel + count]


def layouts(map_: Tensor) -> dict[str, Tensor]:
    """The same map in memory with other strides, NaN between its elements."""
    b, h, w, c = map_.shape

    def room(*sizes: int) -> Tensor:
        return map_.new_full(sizes, torch.nan)

    made: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "slice_of_a_projection": (room(b, h, w, 3 * c), lambda t: cut(t, c, c)),
        "odd_offset": (room(b, h, w, c + 3), lambda t: cut(t, 1, c)),
        "channels_first": (room(b, c, h, w), lambda t: t.permute(0, 2, 3, 1)),
        "columns_first": (room(b, w, h, c), lambda t: t.transpose(1, 2)),
        "batch_last": (room(h, w, c, b), lambda t: t.permute(3, 0, 1, 2)),
        "every_other_channel": (room(b, h, w, 2 * c), lambda t: t[..., ::2]),
        "cropped": (room(b, h + 2, w + 3, c), lambda t: t[:, 1 : h + 1, 2 : w + 2]),
        "every_other_token": (room(b, 2 * h, 2 * w, c), lambda t: t[:, ::2, 1::2]),
    }
    turned = {"closed": map_.contiguous()}
    for name, (memory, view) in made.items():
        view(memory).copy_(map_)
        turned[name] = view(memory)
    return turned
