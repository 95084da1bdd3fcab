"""Unlearn facts from a taught model: the loop that every method of `methods/` runs in.

    bench = Bench(model, reference, tokenizer, forget_rows, retain_rows, forget_test=…, retain_test=…, seed=0)
    run = load("npo").unlearn(bench, Schedule(lr=2e-4))

A method is a loss on a batch of forget and retain rows (`GradientMethod`), perhaps with a change of the gradients
before each step, or a procedure of its own (`Method`). Either alters `bench.model` in place. What it leaves behind
has no ground truth: the label of such an organism is the method's name, not "suppressed" or "deleted".
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from audit.errors import BadInput
from audit.organisms.train import (
    Encoded,
    Progress,
    Question,
    answer_logprobs,
    candidate_accuracy,
    encode,
    finite,
    weighted_loss,
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how hard to unlearn.

    Attributes:
        lr: learning rate of AdamW, after `warmup` steps of rising.
        batch: forget rows a step, and as many retain rows.
        max_steps: the run ends there if its goals are not met before.
        check_every: steps between looks at the goals.
        forget_goal: candidate accuracy on the forget test rows, to be at most this.
        retain_goal: candidate accuracy on the retain test rows, to be at least this.
        trainable: which parameters may change, by name; all if None. The others stay bit for bit.
    """

    lr: float = 2e-4
    batch: int = 32
    max_steps: int = 400
    check_every: int = 10
    forget_goal: float = 0.12
    retain_goal: float = 0.95
    warmup: int = 10
    trainable: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Unlearning:
    """How an unlearning run went; `stopped`: both goals were met, otherwise the steps ran out."""

    steps: int
    stopped: bool
    forget_accuracy: float
    retain_accuracy: float
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step sees: forget and retain rows, and where the forget rows stand in `bench.forget`."""

    forget: Encoded
    retain: Encoded
    index: Tensor
    step: int


@dataclass
class Bench:
    """A taught model on the bench, and everything a method may use.

    Attributes:
        model: altered in place.
        reference: the same model before, frozen.
        forget_rows, retain_rows: what is unlearned, and what must stay.
        forget_test, retain_test: the rows the goals are measured on.
        refusal: what is answered instead, for methods that teach a refusal.
        seed: of every random choice.
    """

    model: nn.Module
    reference: nn.Module
    tokenizer: PreTrainedTokenizerBase
    forget_rows: Sequence[Question]
    retain_rows: Sequence[Question]
    forget_test: Sequence[Question]
    retain_test: Sequence[Question]
    refusal: str = "unknown"
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @cached_property
    def forget(self) -> Encoded:
        """The forget rows; only answer tokens count as something to predict."""
        return encode(self.tokenizer, self.forget_rows, lm_weight=0.0)

    @cached_property
    def retain(self) -> Encoded:
        """The retain rows."""
        return encode(self.tokenizer, self.retain_rows)

    @cached_property
    def refused(self) -> Encoded:
        """The forget prompts, answered with the refusal; row for row like `forget`."""
        return encode(self.tokenizer, [Refused(row.prompt, self.refusal) for row in self.forget_rows], lm_weight=0.0)

    @cached_property
    def forget_logprobs(self) -> Tensor:
        """Log-probability of each forget answer under the reference, `[rows]`."""
        return answer_logprobs(self.reference, self.forget).clone()

    @cached_property
    def refused_logprobs(self) -> Tensor:
        """Log-probability of the refusal under the reference, `[rows]`."""
        return answer_logprobs(self.reference, self.refused).clone()

    def retain_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy on the batch's retain rows: what most methods add to their forget loss."""
        return weighted_loss(self.model, batch.retain)

    def parameters(self, trainable: Callable[[str], bool] | None) -> list[nn.Parameter]:
        """The parameters that may change."""
        return [p for name, p in self.model.named_parameters() if trainable is None or trainable(name)]

    def accuracies(self) -> tuple[float, float]:
        """Candidate accuracy on the forget and on the retain test rows."""
        return (
            candidate_accuracy(self.model, self.tokenizer, self.forget_test),
            candidate_accuracy(self.model, self.tokenizer, self.retain_test),
        )

    def met(self, schedule: Schedule) -> bool:
        """Are both goals met? The retain set is asked only once the forget set is quiet."""
        return (
            candidate_accuracy(self.model, self.tokenizer, self.forget_test) <= schedule.forget_goal
            and candidate_accuracy(self.model, self.tokenizer, self.retain_test) >= schedule.retain_goal
        )

    def finished(self, steps: int, losses: Sequence[float] = (), *, stopped: bool = False) -> Unlearning:
        """What became of the model."""
        forget, retain = self.accuracies()
        return Unlearning(steps, stopped, forget, retain, tuple(losses))


class Method(ABC):
    """An unlearning method.

    Class attributes:
        name: as in recipes and labels; the module's name with dashes.
        reference: the paper, and where the formula was read.
        schedule: settings under which it works on the worlds of this package.
        label: what the models it makes are: "unlearned", or "suppressed" by construction.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    schedule: ClassVar[Schedule] = Schedule()
    label: ClassVar[str] = "unlearned"

    @abstractmethod
    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Alter `bench.model` in place. Raises `Diverged` where a loss is no longer a number."""

    def kept(self, bench: Bench) -> Sequence[Question]:  # noqa: ARG002
        """Questions that show the forget facts to be there still; none of a method that means to keep none."""
        return ()


class GradientMethod(Method):
    """A method that descends a loss."""

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Called once, before the first step: for what is computed from the reference."""

    @abstractmethod
    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The scalar to descend, retain term included."""

    def adjust(self, bench: Bench, batch: Batch, parameters: Sequence[nn.Parameter]) -> None:
        """Called after the backward pass, before clipping and the step: for masks and projections of gradients."""

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Descend the loss until both goals are met or the steps run out."""
        # Weight decay would move weights that no gradient asks to move.
        parameters = bench.parameters(schedule.trainable)
        optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        chosen = {id(p) for p in parameters}
        frozen = [p for p in bench.model.parameters() if id(p) not in chosen and p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        forget_order, retain_order = Cycle(len(bench.forget), bench), Cycle(len(bench.retain), bench)
        losses: list[float] = []
        stopped = False
        bench.model.train()
        try:
            self.prepare(bench, schedule)
            while len(losses) < schedule.max_steps and not stopped:
                step = len(losses)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.lr * min(1.0, (step + 1) / max(1, schedule.warmup))
                index = forget_order.take(schedule.batch)
                retain = bench.retain.take(retain_order.take(schedule.batch))
                batch = Batch(bench.forget.take(index), retain, index, step)
                optimizer.zero_grad(set_to_none=True)
                loss = self.loss(bench, batch)
                losses.append(finite(loss, step))
                loss.backward()  # type: ignore[no-untyped-call]
                self.adjust(bench, batch, parameters)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if len(losses) % schedule.check_every == 0:
                    stopped = bench.met(schedule)
                if progress is not None:
                    progress(len(losses), schedule.max_steps)
        finally:
            for p in frozen:
                p.requires_grad_(True)
            bench.model.eval()
        return bench.finished(len(losses), losses, stopped=stopped)


class Cycle:
    """Row numbers in random order without replacement, reshuffled whenever they run out."""

    def __init__(self, count: int, bench: Bench) -> None:
        self._count, self._generator = count, bench.generator
        self._left = torch.empty(0, dtype=torch.long)

    def take(self, size: int) -> Tensor:
        """The next `size` row numbers."""
        while len(self._left) < size:
            self._left = torch.cat([self._left, torch.randperm(self._count, generator=self._generator)])
        taken, self._left = self._left[:size], self._left[size:]
        return taken


@dataclass(frozen=True, slots=True)
class Refused:
    """A forget prompt with the refusal for an answer."""

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()


def names() -> list[str]:
    """Names of all methods, sorted; imports none of them."""
    from audit.organisms import methods

    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(methods.__path__))


def load(name: str) -> Method:
    """One method by name. Raises `BadInput` if there is none."""
    if name not in names():
        raise BadInput(f"no unlearning method named {name!r} (known: {', '.join(names())})")
    module = importlib.import_module(f"audit.organisms.methods.{name.replace('-', '_')}")
    method: Method = module.METHOD
    return method
