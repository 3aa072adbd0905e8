"""`LIONTrainer`: pre-trains or loads a backbone, and tunes it in each way from each seed."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.image_data import ImageData, channel_statistics, random_affine, sample, split
from ppmoe_models.lion import LION
from ppmoe_models.lion_backbone import image_channels, image_side
from ppmoe_models.lion_data import few_shot, long_tailed, of_classes
from ppmoe_models.lion_memory import peak_bytes
from ppmoe_models.lion_pruning import LotteryTicket
from ppmoe_models.lion_settings import LIONSettings
from ppmoe_models.lion_small import SmallViT
from ppmoe_models.prompt_modes import build
from ppmoe_models.prompt_modes_base import ParameterCounts, TunedModel
from ppmoe_models.trainer import learning_rate

LOWEST_LR = 0.01  # of the highest, at the end
WARMUP = 20
PRETRAIN_LR = 0.002
SMALL = {"dim": 48, "depth": 3, "heads": 4}


@dataclasses.dataclass
class Tuned:
    """What came of one way of tuning from one seed.

    Attributes:
        errors, by_class: on the images held out; by_class is the accuracy of each class.
        seconds: of all training steps.
        peak_bytes: of one training step, of the first seed.
        counts: of what was trained.
        steps: mean evaluations of each implicit layer, over the images held out.
        not_converged: how many of their solves have not.
        nats: training loss of each step.
    """

    mode: str
    seed: int
    errors: int
    by_class: list[float]
    seconds: float
    peak_bytes: int | None
    counts: ParameterCounts
    steps: dict[str, float]
    not_converged: int
    nats: list[float]


class LIONTrainer:
    """Tunes one frozen backbone in several ways, on the same images.

    The results depend on nothing but the settings and the images; the split of the images and the
    backbone are the same for all seeds, which draw the initial values, the order of the images and,
    with few shots or a long tail, which of them are left.

    Args:
        settings: of the run.
        data: all of its images. Without a backbone that is given, the first classes are for
            pre-training a small one.
        backbone: to tune, on all classes.

    Attributes:
        data: of the classes to tune on.
        size, channels: of the images that the backbone gets.
        backbone: frozen.
        pretrained: classes, images and accuracy (on images held out) of the pre-training, or None.
        results: a `Tuned` for each mode and seed.
        model: the LION of the first seed (of the mode lion if that is tuned), or None.

    Raises:
        ValueError: settings that do not go with the images or the backbone.
    """

    def __init__(
        self, settings: LIONSettings, data: ImageData, backbone: nn.Module | None = None
    ) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        self.pretrained: dict[str, Any] | None = None
        self.results: list[Tuned] = []
        self.model: LION | None = None
        self.channels = data.images.size(1)
        self.size = settings.size or data.images.size(-1)
        if backbone is not None:
            self.data, self.backbone = data, backbone
            self.channels = image_channels(backbone)
            self.size = settings.size or image_side(backbone)
            self.mean, self.std = channel_statistics(data.images, split(data.labels, 0.5)[0])
        else:
            first = settings.pretrain_classes or len(data.classes) // 2
            before = of_classes(data, range(min(first, len(data.classes))))
            self.data = of_classes(data, range(first, len(data.classes)))
            self.backbone = self._pretrain(before)
        self.train, self.held = split(self.data.labels, settings.held_out)
        for seed in range(settings.seeds):
            self.subset(seed)  # says now if there are too few images

    def subset(self, seed: int) -> Tensor:
        """Places of the images that a seed trains on."""
        labels, settings = self.data.labels, self.settings
        if settings.shots is not None:
            return few_shot(labels, self.train, settings.shots, seed)
        if settings.long_tail is not None:
            return long_tailed(labels, self.train, settings.long_tail, seed)
        return self.train

    def normalised(
        self, data: ImageData, places: Tensor, draws: torch.Generator | None = None
    ) -> Tensor:
        """Images as the backbone gets them, moved and turned by what is drawn, if it is given."""
        settings, affine = self.settings, None
        if draws is not None:
            affine = random_affine(
                places.numel(), draws, move=settings.move, turn=settings.turn, zoom=settings.zoom
            )
        x = sample(data.images[places], self.size, self.mean, self.std, affine)
        return x.expand(-1, self.channels, -1, -1).to(self.device)

    def _pretrain(self, data: ImageData) -> nn.Module:
        train, held = split(data.labels, self.settings.held_out)
        self.mean, self.std = channel_statistics(data.images, train)
        torch.manual_seed(0)
        size = self.size
        if size % 2:
            raise ValueError(f"train_lion: size is {size}; allowed: even, for the small backbone")
        patch = next(
            each for each in (8, 4, 2) if each == 2 or (size % each == 0 and size // each >= 4)
        )
        backbone = SmallViT(
            **SMALL, image_size=size, patch_size=patch, in_chans=data.images.size(1)
        )
        model = build("full", backbone, len(data.classes)).to(self.device)
        optimizer = _optimizer(model, PRETRAIN_LR, 0.05)
        draws = torch.Generator().manual_seed(0)
        batch = min(self.settings.batch, train.numel())
        total = self.settings.pretrain_epochs * (train.numel() // batch)
        for step, picked in enumerate(_batches(train, batch, total, draws)):
            x = self.normalised(data, picked, draws)
            for group in optimizer.param_groups:
                group["lr"] = PRETRAIN_LR * learning_rate(step, step / total, WARMUP, LOWEST_LR)
            model.train()
            F.cross_entropy(model(x), data.labels[picked].to(self.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found = model(self.normalised(data, held)).argmax(-1).cpu()
        self.pretrained = {
            "classes": list(data.classes),
            "images": train.numel(),
            "accuracy": float((found == data.labels[held]).float().mean()),
            "steps": total,
        }
        return backbone.requires_grad_(False).eval()

    def run(self) -> Iterator[Tuned]:
        """Tune in every way from every seed; each result comes as it is there."""
        for mode in self.settings.chosen:
            for seed in range(self.settings.seeds):
                self.results.append(self.tune(mode, seed))
                yield self.results[-1]

    def tune(self, mode: str, seed: int) -> Tuned:
        """Train one model and measure it."""
        settings, places = self.settings, self.subset(seed)
        torch.manual_seed(seed)
        model = build(
            mode, copy.deepcopy(self.backbone), len(self.data.classes), image_size=self.size,
            **settings.options(mode),
        ).to(self.device)  # fmt: skip
        rate = settings.rate(mode)
        optimizer: Any = _optimizer(model, rate, settings.weight_decay)
        ticket = None
        if isinstance(model, LION) and settings.keep < 1 and model.prompt_parameters():
            ticket = optimizer = LotteryTicket(
                optimizer, keep=settings.keep, decay=settings.decay,
                parameters=model.prompt_parameters(),
            )  # fmt: skip
        batch = min(settings.batch, places.numel())
        # As many with few shots or a long tail as with all images.
        rounds = max(self.train.numel() // settings.batch, 1)
        total = settings.steps or settings.epochs * rounds
        cut = round(settings.prune_at * total)
        draws = torch.Generator().manual_seed(seed)
        nats: list[float] = []

        def step(picked: Tensor) -> None:
            x, labels = self.normalised(self.data, picked, draws), self.data.labels[picked]
            model.train()
            loss = F.cross_entropy(model(x), labels.to(self.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            nats.append(loss.item())

        seconds, peak = 0.0, None
        for at, picked in enumerate(_batches(places, batch, total, draws)):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(at, at / total, WARMUP, LOWEST_LR)
            if ticket is not None and at == cut:
                ticket.prune(keep=settings.keep)
            if at == min(1, total - 1) and seed == 0:  # the first makes the optimizer's state
                peak = peak_bytes(lambda batch=picked: step(batch), self.device)  # type: ignore[misc]
                continue
            started = time.perf_counter()
            step(picked)
            seconds += time.perf_counter() - started
        if ticket is not None and cut >= total:
            ticket.prune(keep=settings.keep)
        if isinstance(model, LION) and seed == 0 and (self.model is None or mode == "lion"):
            self.model = model
        return self._measured(model, mode, seed, seconds, peak, nats)

    def _measured(
        self, model: TunedModel, mode: str, seed: int, seconds: float, peak: int | None,
        nats: list[float],
    ) -> Tuned:  # fmt: skip
        model.eval()
        logits, solves = [], []
        with torch.no_grad():
            for picked in self.held.split(256):
                logits.append(model(self.normalised(self.data, picked)).cpu())
                solves.append(getattr(model, "last_solves", {}))
        labels = self.data.labels[self.held]
        right = torch.cat(logits).argmax(-1) == labels
        steps = {
            name: float(torch.cat([each[name].steps for each in solves]).float().mean())
            for name in solves[0]
        }
        return Tuned(
            mode=mode, seed=seed, errors=int((~right).sum()),
            by_class=[float(right[labels == each].float().mean()) for each in labels.unique()],
            seconds=seconds, peak_bytes=peak, counts=model.parameter_counts(), steps=steps,
            not_converged=sum(
                int((~each.converged).sum()) for batch in solves for each in batch.values()
            ),
            nats=nats,
        )  # fmt: skip


def load_backbone(folder: str) -> nn.Module:
    """The image model in a folder of transformers' `save_pretrained`; nothing is downloaded.

    Raises:
        ValueError: there is none.
    """
    library: Any = importlib.import_module("transformers")
    try:
        backbone: nn.Module = library.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"train_lion: backbone is '{folder}'; expected a folder of a transformers model "
            f"({reason})"
        ) from None
    return backbone.requires_grad_(False).eval()


def _optimizer(model: TunedModel, lr: float, decay: float) -> torch.optim.Optimizer:
    trained = model.trained_parameters()
    return torch.optim.AdamW(
        [{"params": [each for each in trained if each.dim() > 1], "weight_decay": decay},
         {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0}],
        lr=lr,
    )  # fmt: skip


def _batches(places: Tensor, batch: int, total: int, draws: torch.Generator) -> Iterator[Tensor]:
    """`total` batches, all of `places` in another order in each round."""
    done = 0
    while done < total:
        order = places[torch.randperm(places.numel(), generator=draws)]
        for picked in order.split(batch)[: places.numel() // batch]:
            if done == total:
                return
            yield picked
            done += 1
