"""Problems of the whole model: inference, a training step, one block's memory, compile times.

The plain model has the same weights. Both are checked against it in float64, on two images.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import gate, machine, plain_pslt, targets
from .harness import OPERATOR, Baseline, Problem
from .ladder_cases import masked_flops, too_slow
from .ladder_inputs import Maps

Kind = Literal["", "compiled", "compiled SDPA", "itself compiled", "itself compiled, not fused"]
ITSELF = ("itself compiled", "itself compiled, not fused")
SIZE = 224
# What the error is checked on: images do not meet at inference, and few are enough for gradients.
CHECKED = 2
# In place of the rule's 2 or 3: behind a block, its rounding goes through all the others, and torch
# takes the statistics of batch norms in float64.
WHOLE = 10.0


def stage3(batch: int, dtype: torch.dtype = torch.float32) -> Maps:
    """Maps of a branch where windows are shifted."""
    return Maps(batch, 14, 96, 4, dtype)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The package's model and the plain one, with the same weights."""

    ours: nn.Module
    plain: plain_pslt.PlainPSLT


def package(name: str) -> Any:
    """A module of `ppmoe_models`; a source tree that is not installed has it in `python/`."""
    if importlib.util.find_spec("ppmoe_models") is None:
        sys.path.append(str(machine.ROOT / "python"))
    return importlib.import_module(f"ppmoe_models.{name}")


def models(dtype: torch.dtype = torch.float32, seed: int = 0) -> Pair:
    """Random weights, norms that do something, running statistics of a real batch.

    Stochastic depth is off, which costs the plain model more than the operators.
    """
    pslt: Callable[..., nn.Module] = package("pslt").pslt
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = plain_pslt.PlainPSLT(drop_path_rate=0.0)
        ours = pslt(drop_path_rate=0.0)
        settle(plain, torch.randn(2, 3, SIZE, SIZE))
    state = plain.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return Pair(ours.to(dtype), plain.to(dtype))


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give norms and biases values of their own, and statistics those of `x`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" and not isinstance(module, nn.Conv2d):
                nn.init.normal_(parameter, 0, 0.1)
    model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def channels_last(plain: nn.Module, sdpa: bool) -> nn.Module:
    """A copy whose convolutions take and give channels last."""
    model = copy.deepcopy(plain)
    for module in model.modules():
        if isinstance(module, plain_pslt.WindowAttention):
            module.sdpa = sdpa
    last: nn.Module = cast(Any, model).to(memory_format=torch.channels_last)
    return last


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """A call that keeps nothing for a backward."""
    with torch.inference_mode():
        out: Tensor = model(x)
    return out


def infer_traced(model: nn.Module, x: Tensor) -> Tensor:
    """The same for torch.compile, which cannot trace views of weights in inference mode."""
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def train(model: nn.Module, x: Tensor, labels: Tensor, half: bool = False) -> tuple[Tensor, ...]:
    """Loss and gradients; an optimizer would cost both sides the same."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = F.cross_entropy(model(x).float(), labels)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def images(batch: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """As a loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(dtype)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _costs(pair: Pair, x: Tensor, times: int = 1) -> dict[str, Any]:
    """FLOPs of the plain model by torch's counter, less those of masked pairs."""
    with FlopCounterMode(display=False) as counter:
        infer(pair.plain.eval(), x[:1])
    nominal = times * x.size(0) * counter.get_total_flops()
    work = stage3(x.size(0))
    missing = times * plain_pslt.DEPTHS[0] * sum(masked_flops(work, s) for s in work.steps)
    weights = sum(each.nbytes for each in pair.plain.parameters())
    nbytes = times * (weights + x.nbytes)
    return {
        "flops": nominal - missing, "nominal": nominal, "nbytes": nbytes, "composed": True
    }  # fmt: skip


def inference(batch: int, dtype: torch.dtype, kind: Kind, device: torch.device) -> Problem:
    """The fused model; with a `kind`, against what takes long to compile, or compiled itself."""
    pair, x = models(dtype), images(batch, dtype).to(device)
    costs = _costs(pair, x)
    plain, ours = pair.plain.to(device).eval(), pair.ours.to(device).eval()
    fused: nn.Module = cast(Any, ours).fuse_for_inference()
    last = channels_last(plain, True)
    named = {targets.PLAIN: (plain, x), targets.LAST: (last, _last(x))}
    left_out: dict[str, str] = {}
    baselines = [Baseline(name, infer, given) for name, given in named.items()]
    for name, wanted in ((targets.PLAIN, "compiled"), (targets.LAST, "compiled SDPA")):
        long = f"torch.compile of {name}"
        if kind == wanted:
            baselines.append(Baseline(long, infer_traced, named[name], compile=True))
        elif kind not in ITSELF:
            left_out[long] = too_slow()
    if kind in ITSELF:
        marks: dict[str, Any] = {"same_result": False, "compile": True}
        given = (fused if kind == ITSELF[0] else ours, x)
        baselines = [Baseline(targets.ITSELF_COMPILED, infer_traced, given, **marks)]

    def check(came: Tensor) -> gate.Verdict:
        some = x[:CHECKED]
        exact = infer(copy.deepcopy(plain).double(), some.double())
        return gate.agree([came[:CHECKED].clone()], [infer(plain, some)], [exact], WHOLE)

    return Problem(
        (x,),
        tuple(baselines),
        timed=Baseline(OPERATOR, infer, (fused, x)),
        check=check,
        left_out=left_out,
        **costs,
    )


def step(batch: int, half: bool, device: torch.device) -> Problem:
    """Forward, loss and backward; `half` is autocast to bfloat16."""
    pair, x = models(), images(batch, torch.float32).to(device)
    costs = _costs(pair, x, 3)
    labels = torch.arange(batch, device=device) % 10
    plain, ours = pair.plain.to(device).train(), pair.ours.to(device).train()
    # A bias with a gradient leaves SDPA its slow path.
    last = channels_last(plain, False)

    def check(came: tuple[Tensor, ...]) -> gate.Verdict:
        if not all(bool(each.isfinite().all()) for each in came):
            return gate.Verdict(False, "a loss or gradient is not finite")
        some = x[:CHECKED], labels[:CHECKED]
        wide = copy.deepcopy(plain).double()
        sides = ((ours, *some, half), (plain, *some, half), (wide, some[0].double(), some[1]))
        names = [name for name, _ in plain.named_parameters()]
        logits = [_logits(model, images, *rest[1:]) for model, images, *rest in sides]
        verdict = _agree(logits, WHOLE)
        if not verdict.passed:
            return verdict
        grads = [_by_name(each[0], names, train(*each)[1:]) for each in sides]
        mine, other, exact = grads
        return gate.agree_in_norm([mine], [other], [exact])

    return Problem(
        (x,),
        (
            Baseline(targets.PLAIN, train, (plain, x, labels, half)),
            Baseline(targets.LAST_MANUAL, train, (last, _last(x), labels, half)),
        ),
        timed=Baseline(OPERATOR, train, (ours, x, labels, half)),
        check=check,
        **costs,
    )


def _agree(sides: Sequence[Tensor], factor: float) -> gate.Verdict:
    """The rule for ours, the plain one and the exact one."""
    came, plain, exact = sides
    return gate.agree([came], [plain], [exact], factor)


def _logits(model: nn.Module, x: Tensor, half: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        out: Tensor = model(x)
    return out


def _by_name(model: nn.Module, names: list[str], grads: Sequence[Tensor]) -> Tensor:
    """All gradients in one row, in the order of `names`."""
    found = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
    return torch.cat([found[name].flatten() for name in names])


def block_step(work: Maps, device: torch.device) -> Problem:
    """One block in training, FFNs included: time of both directions, and bytes in between."""
    blocks = package("pslt_blocks")
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)
        plain: nn.Module = plain_pslt.LadderBlock(work.channels, work.heads)
        ours = blocks.LadderBlock(work.channels, work.heads)
        x, grad = (torch.randn(work.batch, work.side, work.side, work.channels) for _ in range(2))
        for branch in plain.modules():
            if isinstance(branch, plain_pslt.Branch):
                branch.keep_mask(work.side)
        settle(plain, x)
    state = plain.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    sdpa = channels_last(plain, True)
    sides = {OPERATOR: ours, targets.MANUAL: plain, targets.SDPA: sdpa}
    made = {}
    for name, module in sides.items():
        module.to(device=device, dtype=work.dtype).train()
        given = (module, x.to(device, work.dtype), grad.to(device, work.dtype))
        made[name] = Baseline(name, block_gradients, given)
    kept = {name: _kept(each.args[0], each.args[1]) for name, each in made.items()}
    with FlopCounterMode(display=False) as counter:
        plain(made[OPERATOR].args[1])
    nominal = 3 * counter.get_total_flops()
    weights = sum(each.nbytes for each in plain.parameters())

    def check(came: tuple[Tensor, ...]) -> gate.Verdict:
        wide = copy.deepcopy(plain).double()
        names = [name for name, _ in plain.named_parameters()]
        exact = block_gradients(wide, x.to(device).double(), grad.to(device).double())
        pairs = ((ours, came), (plain, made[targets.MANUAL].call()()), (wide, exact))
        verdict = _agree([each[0] for _, each in pairs], 2.0)
        if not verdict.passed:
            return verdict
        mine, other, wanted = (
            [each[1], _by_name(module, names, each[2:])] for module, each in pairs
        )
        return gate.agree_in_norm(mine, other, wanted)

    return Problem(
        (x,),
        (made[targets.MANUAL], made[targets.SDPA]),
        timed=made[OPERATOR],
        check=check,
        flops=nominal - 3 * sum(masked_flops(work, shift) for shift in work.steps),
        nominal=nominal,
        nbytes=3 * (weights + 2 * x.nbytes),
        composed=True,
        kept=kept,
    )


def block_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The result, then gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    out = module(x)
    return out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad)


def _kept(module: nn.Module, x: Tensor) -> int:
    x = x.detach().requires_grad_()
    return gate.saved_bytes(partial(module, x), (x, *module.parameters(), *module.buffers()))
