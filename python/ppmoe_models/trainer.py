"""`Trainer`: the training loop, its schedule, its measurements and its checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from ppmoe_models.settings import Settings
from ppmoe_models.text_data import TextData, bigram_nats, bigram_table, even_windows, random_windows

LOWEST_LR = 0.1  # of the highest, at the end of the cosine
RISE = 0.1  # of the training at most, for the learning rate to rise in
FOR_TRAINING = 0.95  # of a budget of minutes; the rest is for the last validation and the pictures


@dataclasses.dataclass
class History:
    """What a training has measured, by step.

    Attributes:
        nats: training loss of every step, without the routers' losses.
        balance: mean load-balance loss of the layers with experts, every step.
        validation: (step, nats) of every validation.
        loads: (step, [layers][experts]): slots that chose each expert since the entry before.
        dropped, slots: of the whole training.
        seconds, tokens: of the training steps.
    """

    nats: list[float] = dataclasses.field(default_factory=list)
    balance: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    loads: list[tuple[int, list[list[int]]]] = dataclasses.field(default_factory=list)
    dropped: int = 0
    slots: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def learning_rate(step: int, progress: float, warmup: int, lowest: float = LOWEST_LR) -> float:
    """Share of the highest rate: half a cosine down to `lowest`, after a straight rise.

    Args:
        step: steps done.
        progress: 0 to 1, of the whole training.
        warmup: steps of the rise, which is over after a tenth of the training at the latest.
        lowest: share at the end.

    Example:
        >>> [round(learning_rate(step, step / 100, 5), 3) for step in (0, 4, 50, 100)]
        [0.2, 0.996, 0.55, 0.1]
    """
    rise = min(1.0, max((step + 1) / warmup, progress / RISE))
    return rise * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))


class Learner:
    """One model with its optimizer and its history."""

    def __init__(self, name: str, config: LanguageModelConfig, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        self.model = LanguageModel(config).to(self.device)
        parameters = [(key, each) for key, each in self.model.named_parameters()]
        matrices = [each for key, each in parameters if each.dim() > 1 and "embedding" not in key]
        others = [each for key, each in parameters if each.dim() == 1 or "embedding" in key]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay},
             {"params": others, "weight_decay": 0.0}],
            lr=settings.value("lr"), betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.history = History()
        self._load: Tensor | None = None

    def _call(self, windows: Tensor) -> tuple[LanguageModelOutput, Tensor]:
        windows = windows.to(self.device)
        narrow = self.settings.dtype != "float32"
        dtype = getattr(torch, self.settings.dtype)
        with torch.autocast(self.device.type, dtype=dtype if narrow else None, enabled=narrow):
            out: LanguageModelOutput = self.model(windows[:, :-1])
        return out, F.cross_entropy(out.logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def train(self, windows: Tensor, rate: float) -> None:
        """One step on [B, S + 1] windows."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.value("lr") * rate
        self.model.train()
        out, nats = self._call(windows)
        (nats + out.router_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        history = self.history
        history.nats.append(nats.item())
        if out.losses:
            load = torch.stack([each.load for each in out.losses]).cpu()
            self._load = load if self._load is None else self._load + load
            history.balance.append(torch.stack([each.balance for each in out.losses]).mean().item())
            history.dropped += int(torch.stack([each.dropped for each in out.losses]).sum())
            history.slots += int(load.sum())
        history.seconds += time.perf_counter() - started
        history.tokens += windows.size(0) * (windows.size(1) - 1)

    @torch.no_grad()
    def validate(self, step: int, windows: Tensor) -> None:
        """Note the loss on [N, S + 1] windows, and the experts' load since the last time."""
        self.model.eval()
        batches = windows.split(self.settings.value("batch"))
        total = sum(self._call(batch)[1].item() * batch.size(0) for batch in batches)
        self.history.validation.append((step, total / windows.size(0)))
        if self._load is not None:
            self.history.loads.append((step, self._load.tolist()))
            self._load = None

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": dataclasses.asdict(self.history),
            "load": self._load,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        self._load = state["load"]


class Trainer:
    """Trains one model, or two on the same batches in turn.

    With a number of steps the training depends on nothing else than the settings and the text, and
    a restored one gives the same bits as one that was never stopped. With minutes, schedule and
    validations follow the clock, and so does the result.

    Args:
        settings: of the run.
        text: to train on and to validate with.

    Attributes:
        learners: "ppmoe", and "dense" if that is compared.
        step: steps done.
        elapsed: seconds, over all runs.
        bigram: nats a byte of the bigram model on the validation windows.
        windows: [N, S + 1] of the validation.
    """

    def __init__(self, settings: Settings, text: TextData) -> None:
        config = settings.model()
        self.settings, self.text = settings, text
        self.windows = even_windows(text.validation, settings.windows, config.context + 1)
        self.bigram = bigram_nats(bigram_table(text.train), self.windows)
        self.learners = [Learner("ppmoe", config, settings)]
        if settings.compare_dense:
            self.learners.append(Learner("dense", config.dense(), settings))
        self.batches = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        self.step = 0
        self.elapsed = 0.0

    @property
    def progress(self) -> float:
        """0 to 1, of the steps or of the minutes."""
        if self.settings.steps is not None:
            return min(self.step / self.settings.steps, 1.0)
        return min(self.elapsed / (60 * FOR_TRAINING * self.settings.minutes), 1.0)

    def run(self, save: Callable[[], None] = lambda: None) -> Iterator[float]:
        """Train to the end, and yield the progress after each step.

        `save` is called after each validation.
        """
        started = time.perf_counter() - self.elapsed
        length = self.settings.model().context + 1
        count = self.settings.value("batch")
        if self.step == 0:
            self._validate()
        while self.progress < 1:
            before = self.progress
            rate = learning_rate(self.step, before, self.settings.warmup)
            windows = random_windows(self.text.train, count, length, self.batches)
            for learner in self.learners:
                learner.train(windows, rate)
            self.step += 1
            self.elapsed = time.perf_counter() - started
            parts = self.settings.validations
            if int(self.progress * parts) > int(before * parts):
                self._validate()
                self.elapsed = time.perf_counter() - started
                save()
            yield self.progress

    def _validate(self) -> None:
        for learner in self.learners:
            learner.validate(self.step, self.windows)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "text": self.text.fingerprint,
            "step": self.step,
            "elapsed": self.elapsed,
            "batches": self.batches.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
            "learners": {each.name: each.state() for each in self.learners},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, of a trainer with the same settings (but for the time) and text."""
        if state["text"] != self.text.fingerprint:
            raise ValueError(
                f"train_lm: the text is {self.text.fingerprint}; expected that of the "
                f"checkpoint, {state['text']} (bytes and checksum of the two parts)"
            )
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.batches.set_state(state["batches"])
        for learner in self.learners:
            learner.restore(state["learners"][learner.name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a state to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"train_lm: --resume found no {path}; expected a checkpoint in --out")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
