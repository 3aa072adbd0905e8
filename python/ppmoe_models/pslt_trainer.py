"""`PSLTTrainer`: trains a PSLT on labelled images, beside it one without shifted windows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.image_data import (
    ImageData,
    channel_statistics,
    random_affine,
    sample,
    split,
)
from ppmoe_models.pslt import PSLT
from ppmoe_models.pslt_settings import PSLTSettings
from ppmoe_models.trainer import learning_rate

LOWEST_LR = 0.01  # of the highest, at the end


@dataclasses.dataclass
class ImageHistory:
    """What a training has measured.

    Attributes:
        nats: training loss of every step, label smoothing included.
        validation: (step, nats, errors) on the images held out, of every validation.
        seconds, images: of the training steps.
    """

    nats: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class ImageLearner:
    """One model with its optimizer, its history and its own random numbers."""

    def __init__(self, name: str, settings: PSLTSettings, make: Callable[[], PSLT]) -> None:
        self.name, self.settings = name, settings
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        self.model = make().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # What this model draws does not depend on whether another is trained beside it.
        self._random = torch.get_rng_state()
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for key, parameter in self.model.named_parameters():
            decays = parameter.dim() > 1 and "bias_table" not in key
            (matrices if decays else others).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay},
             {"params": others, "weight_decay": 0.0}],
            lr=settings.lr, fused=True,
        )  # fmt: skip
        self.history = ImageHistory()

    def _call(self, x: Tensor) -> Tensor:
        narrow = self.settings.dtype != "float32"
        dtype = getattr(torch, self.settings.dtype)
        with torch.autocast(self.device.type, dtype=dtype if narrow else None, enabled=narrow):
            logits = self.model(x)
        assert isinstance(logits, Tensor)
        return logits.float()

    def train(self, x: Tensor, labels: Tensor, rate: float) -> None:
        """One step on normalised images."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate
        self.model.train()
        x, labels = x.to(self.device), labels.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            logits = self._call(x)
            self._random = torch.get_rng_state()
        nats = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        nats.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history.nats.append(nats.item())
        self.history.seconds += time.perf_counter() - started
        self.history.images += labels.numel()

    @torch.no_grad()
    def logits(self, batches: Iterable[Tensor]) -> Tensor:
        """[N, classes] for batches of normalised images, without training anything."""
        self.model.eval()
        return torch.cat([self._call(batch.to(self.device)).cpu() for batch in batches])


class PSLTTrainer:
    """Trains one PSLT, or two on the same batches in turn.

    The training depends on nothing but the settings and the images; the same machine and number of
    threads give the same bits.

    Args:
        settings: of the run.
        data: its images are split by `settings.held_out`; the split is the same for every seed.

    Attributes:
        learners: "pslt", and "unshifted" if that is compared.
        step, steps: done, and to be done.
        elapsed: seconds of `run`, and `cpu_seconds` of all threads.
        held: places in the data of the images held out.
        mean, std: of each channel of the training images, as `sample` wants them.
        confusion: after a validation, of each learner: [classes, classes] counts on the images held
            out, the true classes down, the found ones across.
    """

    def __init__(self, settings: PSLTSettings, data: ImageData) -> None:
        self.settings, self.data = settings, data
        self.train, self.held = split(data.labels, settings.held_out)
        self.mean, self.std = channel_statistics(data.images, self.train)
        self.batch = min(settings.batch, self.train.numel())
        self.per_epoch = self.train.numel() // self.batch
        self.steps = settings.steps or settings.epochs * self.per_epoch
        sizes = {"num_classes": len(data.classes), "in_chans": data.images.size(1)}
        kinds = {"pslt": True, "unshifted": False}
        if not settings.compare_unshifted:
            del kinds["unshifted"]
        self.learners = [
            ImageLearner(name, settings, partial(settings.model, **sizes, shifts=shifts))
            for name, shifts in kinds.items()
        ]
        self.confusion: dict[str, Tensor] = {}
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.elapsed = self.cpu_seconds = 0.0

    def normalised(self, places: Tensor, affine: Tensor | None = None) -> Tensor:
        """Images of the data as the model gets them, moved and turned by `affine` if given."""
        images, size = self.data.images[places], self.settings.sizes["size"]
        return sample(images, size, self.mean, self.std, affine)

    def run(self, save: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Train to the end, and yield the number of steps done after each.

        `save` is called after each validation.
        """
        started, settings = (time.perf_counter(), time.process_time()), self.settings
        while self.step < self.steps:
            order = torch.randperm(self.train.numel(), generator=self.draws)
            for picked in order.split(self.batch)[: self.per_epoch]:
                places = self.train[picked]
                affine = random_affine(
                    places.numel(), self.draws, move=settings.move, turn=settings.turn,
                    zoom=settings.zoom, mirror=settings.mirror,
                )  # fmt: skip
                x, labels = self.normalised(places, affine), self.data.labels[places]
                progress = self.step / self.steps
                rate = learning_rate(self.step, progress, settings.warmup, LOWEST_LR)
                for learner in self.learners:
                    learner.train(x, labels, rate)
                self.step += 1
                parts = settings.validations
                if self.step * parts // self.steps > (self.step - 1) * parts // self.steps:
                    self.validate()
                    save()
                self.elapsed = time.perf_counter() - started[0]
                self.cpu_seconds = time.process_time() - started[1]
                yield self.step
                if self.step == self.steps:
                    break

    def validate(self) -> None:
        """Note each learner's loss and errors on the images held out."""
        labels, classes = self.data.labels[self.held], len(self.data.classes)
        for learner in self.learners:
            batches = self.held.split(self.settings.batch)
            logits = learner.logits(self.normalised(places) for places in batches)
            nats = F.cross_entropy(logits, labels).item()
            counts = confusion_counts(labels, logits.argmax(-1), classes)
            self.confusion[learner.name] = counts
            errors = int(counts.sum() - counts.diagonal().sum())
            learner.history.validation.append((self.step, nats, errors))

    def checkpoint(self) -> dict[str, Any]:
        """The first model, and what an evaluation has to know of its images."""
        return {
            "model": self.learners[0].model.state_dict(),
            "classes": list(self.data.classes),
            "size": self.settings.sizes["size"],
            "stored": self.data.images.size(-1),
            "mean": self.mean,
            "std": self.std,
        }


def confusion_counts(labels: Tensor, found: Tensor, classes: int) -> Tensor:
    """[classes, classes] int64: how often each class (axis 0) was taken for each (axis 1).

    Example:
        >>> import torch
        >>> confusion_counts(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    pairs = labels * classes + found
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
