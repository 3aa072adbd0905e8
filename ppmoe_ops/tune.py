"""`python -m ppmoe_ops.tune`: choose the Triton kernels' tile sizes for a model's shapes by time.

The choices are stored for this device and used where PPMOE_OPS_AUTOTUNE is `cached` or `1`.
`--show` prints what is stored, for any device. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ppmoe_ops.ops.expert_slice.activations import ACTIVATIONS, GATED

DTYPES = ("bfloat16", "float16", "float32")
DEVICE = "cuda"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status.

    Example:
        >>> from ppmoe_ops import tune
        >>> tune.main(["--hidden", "0"])
        Traceback (most recent call last):
            ...
        SystemExit: 2
    """
    parser = argparse.ArgumentParser(prog="python -m ppmoe_ops.tune", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print what is stored, and no more")
    for name, default, what in (
        ("hidden", 2048, "width of a token"),
        ("width", 768, "width of an expert"),
        ("experts", 128, "experts on this device"),
        ("top-k", 8, "choices of a token"),
    ):
        parser.add_argument(f"--{name}", type=_positive, default=default, help=what)
    parser.add_argument("--tokens", type=_positive, nargs="+", default=[1, 512, 4096])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="swiglu")
    given = parser.parse_args(arguments)
    if given.show:
        return show()
    if given.top_k > given.experts:
        parser.error(f"--top-k is {given.top_k}; expected at most --experts, {given.experts}")
    if not torch.cuda.is_available():
        print("ppmoe_ops.tune: needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("ppmoe_ops.tune: needs Triton, which is not installed", file=sys.stderr)
        return 2
    os.environ["PPMOE_OPS_AUTOTUNE"] = "1"
    for tokens in given.tokens:
        print(f"{tokens} tokens", flush=True)
        run_products(given, tokens)
    return show()


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is less than 1")
    return number


def show() -> int:
    """Print every stored choice, by device."""
    from ppmoe_ops.kernels import _choices

    files = sorted(_choices.folder().glob("tuned-*.json"))
    if not files:
        print(f"nothing is stored in {_choices.folder()}")
    for path in files:
        print(path.name)
        for key, record in _choices.read(path).items():
            print(f"  {key}: {json.dumps(record['config'])}")
            if "ms" in record and "table_ms" in record:
                print(f"    {record['ms']:.4f} ms; the table's {record['table_ms']:.4f} ms")
            for dropped in record.get("dropped", ()):
                print(f"    dropped {json.dumps(dropped['config'])}: {dropped['why']}")
    return 0


def run_products(given: argparse.Namespace, tokens: int, device: str = DEVICE) -> None:
    """Call every tuned operator once, forward and backward, for inference and for training."""
    from ppmoe_ops.kernels.expert_slice import expert_ffn, expert_ffn_backward, grouped_linear
    from ppmoe_ops.kernels.expert_slice.expert_index import expert_index

    dtype = getattr(torch, given.dtype)
    halves = 2 if given.activation in GATED else 1
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    scores = torch.rand(tokens, given.experts, generator=generator)
    ids = scores.topk(given.top_k).indices.to(device=device, dtype=torch.int32)
    slots, offsets = expert_index(ids, 0, given.experts)
    x, weights = drawn(tokens, given.hidden), torch.rand(tokens, given.top_k, device=device)
    w_in = drawn(given.experts, halves * given.width, given.hidden) / given.hidden**0.5
    w_out = drawn(given.experts, given.hidden, given.width) / given.width**0.5
    args = (x, slots, offsets, weights, w_in, None, w_out, None, given.activation)
    expert_ffn.expert_ffn_forward(*args, False)
    _, pre = expert_ffn.expert_ffn_forward(*args, True)
    common = (drawn(tokens, given.hidden), x, slots, offsets, weights, w_in, w_out, None, pre)
    needs = (True, True, True, False, True, False)
    expert_ffn_backward.expert_ffn_backward(*common, given.activation, *needs)
    for weight in (w_in, w_out):
        rows = drawn(slots.numel(), weight.size(2))
        out = grouped_linear.grouped_linear(rows, offsets, weight)
        grouped_linear.grouped_linear_backward(out, rows, offsets, weight, True, True, False)


if __name__ == "__main__":
    sys.exit(main())
