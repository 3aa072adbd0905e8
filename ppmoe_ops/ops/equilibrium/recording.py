"""The graph of one call of f, and how its gradients are exchanged for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Nodes of a graph and, of each, the positions of its edges that lead out of f.
Border = list[tuple[Any, list[int]]]
Gradients = tuple[Tensor | None, ...]


class Recording:
    """One call of f: its graph lies between the edges `end` (the result) and `start` (the state).

    Its other edges lead to what f closes over: parameters, and inputs with a history of their own.
    """

    def __init__(self, start: GradientEdge, end: GradientEdge) -> None:
        self.start, self.end = start, end
        self._hooks: list[Any] = []

    def _outside(self, node: Any) -> bool:
        """A leaf, the state, or older than the call."""
        if node is self.start.node or hasattr(node, "variable"):
            return True
        return node._sequence_nr() < self.start.node._sequence_nr()

    def depends(self) -> bool:
        """Whether anything but the state wants a gradient."""
        pending: list[Any] = [self.end.node]
        seen = set()
        while pending:
            node = pending.pop()
            if node is None or node is self.start.node or node in seen:
                continue
            if self._outside(node):
                return True
            seen.add(node)
            pending.extend(each for each, _ in node.next_functions)
        return False

    def forget(self) -> None:
        """Take back what is left of an exchange."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def replace(self, state: GradientEdge, end: GradientEdge, w: Tensor) -> None:
        """Give what f closes over its gradients from another recording of the same call.

        That one was made at `state`, a point with a history, so that its gradients know how they
        change with the solution; those of this one do not. The next backward through this graph
        hands them on, whatever w it was given. Gradients stop at the border of f: what an input
        came from gets its own from there, in the outer backward.
        """
        mine = _border(self.end.node, self._outside)
        outer = {id(node.next_functions[k][0]) for node, edges in mine for k in edges}
        outer.add(id(state.node))

        def outside(node: Any) -> bool:
            return id(node) in outer or hasattr(node, "variable")

        other = _border(end.node, outside)
        if [(node.name(), edges) for node, edges in mine] != [
            (node.name(), edges) for node, edges in other
        ]:
            raise RuntimeError(
                "equilibrium: f records another graph than in the forward; allowed: the same one, "
                "where gradients through 'ift' are differentiated"
            )
        came: list[Gradients | None] = [None] * len(other)
        handles = [
            node.register_hook(_keep(came, number, edges))
            for number, (node, edges) in enumerate(other)
        ]
        asked = list(
            dict.fromkeys(
                GradientEdge(*node.next_functions[k]) for node, edges in other for k in edges
            )
        )
        try:
            torch.autograd.grad([end], asked, [w], create_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        self._hooks = [
            node.register_hook(_exchange(came, number, edges))
            for number, (node, edges) in enumerate(mine)
        ]
        # A backward that does not need all of this graph leaves some of them where they are.
        torch.autograd.Variable._execution_engine.queue_callback(self.forget)


def _border(node: Any, outside: Callable[[Any], bool]) -> Border:
    """Nodes with edges that lead outside, in an order that the graph's structure alone decides."""
    found: Border = []
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        edges = []
        for position, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            if outside(following):
                edges.append(position)
            elif following not in seen:
                seen.add(following)
                pending.append(following)
        if edges:
            found.append((node, edges))
    return found


def _keep(came: list[Gradients | None], number: int, edges: list[int]) -> Any:
    def hook(gradients: Gradients, _: Gradients) -> Gradients:
        came[number] = gradients
        return tuple(None if k in edges else each for k, each in enumerate(gradients))

    return hook


def _exchange(came: list[Gradients | None], number: int, edges: list[int]) -> Any:
    def hook(gradients: Gradients, _: Gradients) -> Gradients:
        kept = came[number]
        if kept is None:
            return gradients
        return tuple(
            kept[k] if k in edges and each is not None else each for k, each in enumerate(gradients)
        )

    return hook
