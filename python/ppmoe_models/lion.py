"""LION: implicit vision prompt tuning, two equilibrium layers around a frozen backbone.

Of the paper (arXiv 2303.09992v3, AAAI 2024) the abstract and the first paragraph could be read, and
notes of a reader of the whole; no equation, table or hyper-parameter, and no code was found. So
this is not a reproduction, and none of its numbers are the paper's. Line by line, where each choice
is from: [paper] its own text, [notes] a reader's notes of it, [ours] nothing that could be read
settles it.

- The backbone is frozen: [paper].
- Exactly two implicit (equilibrium) layers, one in front of the input and one behind the output of
  the backbone: [paper]. That either can be switched off: [ours], for ablations.
- The fixed point of the first is a prompt that is fused with the image: [notes]. In pixel space:
  [ours], as "image" is all that is said and as it suits convolutional and transformer backbones
  alike; the patch embeddings are an option.
- What the first layer computes: [ours], a bottleneck of a 1x1, a 3x3 and a 1x1 convolution. Without
  a group norm, as the contraction below does its work and f then is one fused operator.
  On patch embeddings an MLP bottleneck for each token: [ours].
- The fixed point of the second is a prompt that is fused with the feature: [notes]. What it is
  computed from: [ours]. The notes say the image, perhaps loosely; here it is the feature, and the
  image, pooled to a grid, is an option.
- What the second layer computes: [ours], an MLP bottleneck z = W2 act(W1 z + P u + b1) + b2.
- The input is injected inside the non-linearity, additively: [ours]. Rows are normalised before, so
  that the layer does not depend on how large a backbone's features are: [ours].
- Fusion, x + s P and h + s P with a trained scalar s for each layer that starts at 0: [ours]; the
  notes say "fused".
- The two layers share no weights: [ours].
- Activation tanh, widths 8 and 16, initial weights as `nn.Linear`'s: [ours].
- Solver: [ours], Anderson, relative tolerances 1e-3 (images) and 1e-4 (features), at most 30 steps.
- Backward: [ours], the implicit function theorem.
- Contraction: [ours], spectral norms limited to 0.95; see `ppmoe_models.lion_layers`.
- A fully connected classifier on the fused feature, trained: [notes].
- Training prunes the two layers by the lottery hypothesis: [paper]; crucial parameters are updated
  in the ordinary way, the others only shrink: [notes]. The score, the threshold and the penalty:
  [ours], see `ppmoe_models.lion_pruning`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.lion_backbone import replaced_inputs, shapes_of, token_blocks
from ppmoe_models.lion_layers import CONTRACTION, ImplicitConv, ImplicitMLP, Solve
from ppmoe_models.prompt_modes_base import TunedModel

INPUT_PROMPTS = ("pixels", "patches", None)
REPRESENTATION_PROMPTS = ("feature", "image", None)


class LION(TunedModel):
    """A frozen image backbone between two implicit prompt layers, and a classifier.

    With the prompts' scales at 0, as they start, the result is that of linear probing, bit for bit.
    Then the prompts' weights get no gradient in the first step but their scales do; from the second
    step on all are trained.

    The backbone stays in evaluation mode, and gradients pass through it to the first layer without
    any for its parameters.

    Args:
        backbone, num_classes: as `TunedModel`'s.
        input_prompt: "pixels" (a convolutional bottleneck on the image), "patches" (an MLP
            bottleneck on each token that the first block gets) or None.
        input_width: r of that bottleneck.
        representation_prompt: "feature" or "image", what the second layer is computed from, or
            None.
        representation_width: r of its bottleneck.
        image_grid: cells a side that "image" pools the image to.
        activation: of both, and `contraction`, the limit of their Lipschitz constants (None: no
            limit).
        solver: "anderson", "fixed_point" or, without a layer on pixels, "newton".
        input_rtol, representation_rtol, max_iter: where solvers stop.
        warn: whether to warn, once, where a solve does not converge. On a GPU that waits for each
            forward call.
        blocks: the backbone's blocks for "patches", where it is not of a known library.
        others: as `TunedModel`'s.

    Attributes:
        last_solves: of the last forward call, a `Solve` for "input" and one for "representation":
            steps, residuals and which have converged.
        input_scale, representation_scale: the two s.

    Shapes:
        [B, C, H, W] to [B, K]. Trained, beside the classifier's (d + 1) K: on pixels 9r^2 + 3Cr +
        2r + C + 1, on patches of D channels 3Dr + r + D + 1, on the feature 3dr + r + d + 1, on the
        image 2dr + C grid^2 r + r + d + 1.

    Source: LION (arXiv 2303.09992), as far as it could be read; see this module.

    Example:
        >>> import torch
        >>> from ppmoe_models import LION
        >>> from ppmoe_models.lion_small import SmallViT
        >>> model = LION(SmallViT(32), num_classes=5)
        >>> model(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 5])
        >>> {name: bool(each.converged.all()) for name, each in model.last_solves.items()}
        {'input': True, 'representation': True}
        >>> model.parameter_counts().nominal
        2368
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        input_prompt: str | None = "pixels",
        input_width: int = 8,
        representation_prompt: str | None = "feature",
        representation_width: int = 16,
        image_grid: int = 4,
        activation: str = "tanh",
        contraction: float | None = CONTRACTION,
        solver: str = "anderson",
        input_rtol: float = 1e-3,
        representation_rtol: float = 1e-4,
        max_iter: int = 30,
        warn: bool = True,
        blocks: list[nn.Module] | None = None,
        **others: Any,
    ) -> None:
        for name, value, allowed in (
            ("input_prompt", input_prompt, INPUT_PROMPTS),
            ("representation_prompt", representation_prompt, REPRESENTATION_PROMPTS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"LION: {name} is {value!r}; allowed: {', '.join(map(repr, allowed))}"
                )
        if solver == "newton" and input_prompt == "pixels":
            raise ValueError(
                "LION: solver is 'newton' with input_prompt 'pixels'; allowed: anderson, "
                "fixed_point"
            )
        if image_grid < 1:
            raise ValueError(f"LION: image_grid is {image_grid}; allowed: 1 or more")
        super().__init__(backbone, num_classes, **others)
        self.image_grid, self.warn = image_grid, warn
        self.from_image = representation_prompt == "image"
        self.last_solves: dict[str, Solve] = {}
        shared: dict[str, Any] = {
            "activation": activation, "contraction": contraction, "solver": solver,
            "max_iter": max_iter,
        }  # fmt: skip
        self.input_prompt: ImplicitConv | ImplicitMLP | None = None
        self.representation_prompt: ImplicitMLP | None = None
        self._first: tuple[nn.Module, ...] = ()  # a tuple, so that it is no child of this module
        if input_prompt == "pixels":
            self.input_prompt = ImplicitConv(self.in_chans, input_width, rtol=input_rtol, **shared)
        elif input_prompt == "patches":
            self._first = ((token_blocks(backbone, "LION") if blocks is None else blocks)[0],)
            _, got, _ = shapes_of(self.represent, backbone, self.example(), self._first)
            dim = got[0][-1]
            self.input_prompt = ImplicitMLP(dim, dim, input_width, rtol=input_rtol, **shared)
        if representation_prompt is not None:
            of_image = self.in_chans * image_grid**2
            self.representation_prompt = ImplicitMLP(
                self.feature_dim, of_image if self.from_image else self.feature_dim,
                representation_width, rtol=representation_rtol, **shared,
            )  # fmt: skip
        for name, layer in (
            ("input_scale", self.input_prompt),
            ("representation_scale", self.representation_prompt),
        ):
            if layer is not None:
                layer.to(self.head.weight)
            scale = None if layer is None else nn.Parameter(self.head.weight.new_zeros(()))
            self.register_parameter(name, scale)

    def prompted_features(self, images: Tensor) -> Tensor:
        self.last_solves = {}
        h = self._of_prompted(images)
        if self.representation_prompt is not None:
            u = h
            if self.from_image:
                u = F.adaptive_avg_pool2d(images, self.image_grid).flatten(1)
            prompt, self.last_solves["representation"] = self.representation_prompt(u)
            h = h + (self.representation_scale * prompt).to(h.dtype)
        self._warn_once()
        return h

    def _of_prompted(self, images: Tensor) -> Tensor:
        if self.input_prompt is None:
            return self.represent(images)
        if not self._first:
            prompt, self.last_solves["input"] = self.input_prompt(images)
            return self.represent(images + (self.input_scale * prompt).to(images.dtype))

        def fuse(tokens: Tensor) -> Tensor:
            assert self.input_prompt is not None
            rows, self.last_solves["input"] = self.input_prompt(tokens.flatten(0, -2))
            return tokens + (self.input_scale * rows).to(tokens.dtype).view_as(tokens)

        with replaced_inputs([(self._first[0], fuse)]):
            return self.represent(images)

    def _warn_once(self) -> None:
        if not self.warn or torch.compiler.is_compiling():
            return
        for name, solve in self.last_solves.items():
            if not bool(solve.converged.all()):
                self.warn = False
                warnings.warn(
                    f"LION: {int((~solve.converged).sum())} of {solve.steps.numel()} solves of the "
                    f"{name} prompt have not converged (the largest residual is "
                    f"{solve.residual.max().item():.3g}); their best states are used. This is "
                    "said once; see last_solves",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
