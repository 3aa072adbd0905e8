"""What an operator is timed against: plain calls, their derivatives, and their compiled forms."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Something to be faster than; also the operator's own side where that is not a plain call.

    Attributes:
        function, args: what is called.
        wrt, grads: the timed call is `torch.autograd.grad` of `function(*args)` with respect to
            these arguments, on a graph that is kept.
        step: with `wrt`, the forward is part of the timed call, which returns its results and then
            the gradients.
        turns: further arguments of equal cost; calls take them in turn, so that each finds
            weights that no cache holds.
        same_result: False for a baseline that only does equal work.
        dense: such a baseline that is dense products and nothing else.
        flops: of those products, where they are not all that the operator executes.
        compile: run by torch.compile, as one graph of fixed shapes.
        parameters: of a module in `function`: there anyway, so a forward does not keep them.
    """

    name: str
    function: Function
    args: tuple[Any, ...]
    wrt: tuple[int, ...] = ()
    grads: tuple[Tensor, ...] = ()
    step: bool = False
    turns: tuple[tuple[Any, ...], ...] = ()
    same_result: bool = True
    dense: bool = False
    flops: int = 0
    compile: bool = False
    parameters: tuple[Tensor, ...] = ()

    def call(self, counter: Iterator[int] | None = None) -> Callable[[], Any]:
        """The callable that is timed; `counter` is shared by those that must not meet a turn."""
        if not self.turns:
            return self._call(self.args)
        calls = [self._call(args) for args in (self.args, *self.turns)]
        count = counter if counter is not None else itertools.count()
        return lambda: calls[next(count) % len(calls)]()

    def _call(self, given: tuple[Any, ...]) -> Callable[[], Any]:
        if not self.wrt:
            return partial(self.function, *given)
        args = self._leaves(given)
        if self.step:
            return partial(_step, self.function, args, self.wrt, self.grads)
        results = gate.outputs(self.function(*args))
        results = [each for each in results if each.requires_grad][: len(self.grads)]
        leaves = [args[position] for position in self.wrt]
        grads = [grad.to(each.dtype) for grad, each in zip(self.grads, results, strict=True)]
        return partial(torch.autograd.grad, results, leaves, grads, retain_graph=True)

    def saved_bytes(self) -> int:
        """Bytes that its forward keeps for the backward."""
        args = self._leaves(self.args)
        return gate.saved_bytes(partial(self.function, *args), (*args, *self.parameters))

    def _leaves(self, given: tuple[Any, ...]) -> list[Any]:
        args = list(given)
        for position, value in enumerate(args):
            wanted = position in self.wrt if self.wrt else _differentiable(value)
            if wanted and value is not None:
                args[position] = value.detach().requires_grad_()
        return args


def _step(
    function: Function, args: list[Any], wrt: tuple[int, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    # torch.autograd.grad leaves no .grad behind, so nothing is added up from call to call.
    results = [each for each in gate.outputs(function(*args)) if each.requires_grad]
    results = results[: len(grads)]
    found = torch.autograd.grad(results, [args[position] for position in wrt], grads)
    return (*(each.detach() for each in results), *found)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def compile_and_call(baseline: Baseline) -> tuple[Callable[[], Any], float]:
    """The callable that is timed, after its first call, and the seconds that that one took.

    Compiling finds empty caches, but a compiler that has been used before in this process.
    """
    _use_compiler_once()
    function = torch.compile(baseline.function, fullgraph=True, dynamic=False)
    with _empty_caches():
        start = time.perf_counter()
        call = dataclasses.replace(baseline, function=function).call()
        call()
        return call, time.perf_counter() - start


@contextlib.contextmanager
def _empty_caches() -> Iterator[None]:
    config: Any = importlib.import_module("torch._inductor.config")
    utils: Any = importlib.import_module("torch._inductor.utils")
    # Generated loops have the number of threads in them.
    with utils.fresh_cache(), config.patch({"cpp.threads": torch.get_num_threads()}):
        yield


@functools.cache
def _use_compiler_once() -> None:
    """What a process does once takes longer than many a graph: imports, probing the processor."""
    with _empty_caches():
        torch.compile(torch.sin, dynamic=False)(torch.ones(64))
