"""Continual requests: when deletions are asked for one after the other, does each stay done, and does the rest stay?

What is measured: the original unlearns the forget entities in k requests, one after the other, by NPO with a retain
loss, each until its facts are as unlikely as facts that were never taught. After every request i:

    F      = (probability * match * accuracy)^(1/3) over the rows of requests 1..i, R the same over the retain rows
    F.D.   = max(0, 1 - |F / F_Q - 1|),   R.U. = max(0, 1 - |R / R_Q - 1|)

Q is the retrained model where given; else F_Q is the original's holdout rows, R_Q its retain rows. Probability is of
an answer's token, geometric mean; match the share of an answer's tokens that are the first choice; accuracy multiple
choice.

    relapse = accuracy on the rows of requests 1..k-1 at the end, less that right after their own request
    finding = relapse of forget rows - what holdout rows changed by in the meantime

Source: FIT, Xu et al. 2026 (arXiv 2601.21682), for stream, F.D. and R.U.; read second hand, its code was not found. The
method here is NPO (Zhang et al. 2024, arXiv 2404.05868), not FIT's. FIT takes ROUGE of what is written; match stands
for it, and is the same where answers are one token long.

Traps:

- *It says nothing of the target's own forgetting*, but of the original and this method. So it runs only when asked for
  by name, answers the question of utility, and decides nothing.
- *F.D. is a ratio to a small number*: never-taught facts have an F near 0, so that F twice as large is an F.D. of 0,
  and a geometric mean is 0 if one of its parts is. Look at the accuracies beside it.
- *Unlearning may spread*: a later request's facts may be gone before it is made. The table has what is known of them.
- *One order of requests*, drawn by seed; the interval is over entities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.recall import questions, recalled, tested
from attacks.recovery import Group, Rows, curve_figure
from audit.arrays import finite
from audit.case import Case
from audit.evidence import Evidence
from audit.finetune import descend, endless, learning_rate, padded
from audit.instrument import Access, Attack, Stage
from audit.plan import Request
from audit.progress import part_of
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import dealt, mean_estimate, two_sample
from audit.tokens import Tokens

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = ["Continual", "Recipe", "answer_logprobs", "degree", "unlearn"]

Floats = NDArray[np.float64]
_SOURCE = "FIT (Xu et al. 2026, arXiv 2601.21682); NPO (Zhang et al. 2024, arXiv 2404.05868)"
_SETS = ("forget", "holdout", "retain")
_REQUESTS = {"quick": 2, "standard": 4, "thorough": 8}
_THRESHOLD = 0.1


@dataclass(frozen=True)
class Recipe:
    """How a request is unlearned.

    Attributes:
        most: steps, at most.
        check: steps between looks at whether it is done.
        batch: rows a step, half of them retain rows.
        learning_rate: of AdamW.
        beta, retain_weight: of NPO.
    """

    most: int = 80
    check: int = 5
    batch: int = 32
    learning_rate: float = 2e-4
    beta: float = 0.1
    retain_weight: float = 4.0


def recipe_for(target: Target) -> Recipe:
    """The learning rate falls with the cube root of size; half the rows from 20 million parameters on."""
    size = target.inventory.parameters
    return Recipe(batch=32 if size < 2e7 else 16, learning_rate=learning_rate(size, 5e-4, 1e-5))


def answer_logprobs(model: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """Log-probability of each row's whole answer, in nats, with a gradient: [rows]."""
    import torch

    device = next(model.parameters()).device
    ids, labels = padded(rows)
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:].to(device)
    found = logits.log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return torch.where(wanted >= 0, found, 0.0).sum(1)


def unlearn(
    model: Any,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    level: float,
    recipe: Recipe,
    *,
    seed: int,
    tick: Callable[[int], None] | None = None,
) -> int:
    """Unlearn `forget` in place by NPO beside a loss on `retain`; returns the steps taken.

    Done as soon as a token of the answers of `forget` has a mean log-probability of `level` or less.
    """
    import torch

    from audit.finetune import text_loss
    from audit.organisms.methods.npo import npo_loss

    def logprobs() -> torch.Tensor:
        parts = [forget[i : i + recipe.batch] for i in range(0, len(forget), recipe.batch)]
        with torch.no_grad():
            return torch.cat([answer_logprobs(model, part) for part in parts])

    def known() -> float:
        return float(logprobs().sum()) / sum(tokens.scored for tokens in forget)

    half = recipe.batch // 2
    before = dict(zip((tokens.key for tokens in forget), logprobs(), strict=True))

    def loss(batch: Sequence[Tokens]) -> torch.Tensor:
        reference = torch.stack([before[tokens.key] for tokens in batch[:half]])
        pushed = npo_loss(answer_logprobs(model, batch[:half]), reference, recipe.beta)
        return pushed + recipe.retain_weight * text_loss(model, batch[half:])

    rng = np.random.default_rng(seed)
    sources = [(endless(rows, rng), half) for rows in (forget, retain)]
    taken = 0
    if known() > level:
        for taken in descend(model, sources, recipe.most, recipe.learning_rate, loss):
            if tick is not None:
                tick(taken)
            if taken % recipe.check == 0 and known() <= level:
                break
    return taken


def degree(value: ArrayLike, reference: float) -> Floats:
    """FIT's F.D. and R.U. of values of any shape [...]: max(0, 1 - |value / reference - 1|). NaN for a reference of 0.

    Raises ValueError where a value is not finite.
    """
    values = finite(value, "value")
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.maximum(0.0, 1 - np.abs(values / reference - 1))
    return np.asarray(np.where(reference > 0, found, np.nan))


class Continual(Attack):
    """Does every request of a stream stay done, and what does the stream cost?"""

    name = "continual"
    title = "Do earlier deletions outlive later ones?"
    aside = "asks about a method, not about this model: it unlearns"
    question = Question.UTILITY
    access = Access.WEIGHTS
    sets = _SETS
    roles = ("original",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """A stream needs at least two requests of two entities."""
        reason = super().missing(case)
        if reason is not None:
            return reason
        if len(set(case.clusters(tested(case, "forget")))) < 4:
            return "needs at least 4 entities in the forget set to delete them in two requests"
        return None

    def requests(self, case: Case, target: Target) -> list[Request]:
        """Answers and wrong answers of all rows, before and after every request; and the retrained model's."""
        host, _, stage = target.role.partition("+")
        asked = host in ("original", "retrained") and (not stage or stage.startswith(f"{self.name}@"))
        return questions(case, target, self.name) if asked else []

    def cost(self, case: Case, target: Target) -> str:
        """How much is unlearned."""
        return f": {_count(case)} requests of at most {recipe_for(target).most} steps"

    def stages(self, case: Case, target: Target) -> list[Stage]:
        """One a request, of the original."""
        if target.role != "original":
            return []
        sets = ",".join(case.sets[name].digest for name in _SETS)
        given = f"{recipe_for(target)}/{case.options.seed}/{case.options.budget.value}/{target.template}/{sets}"
        return [Stage(f"{self.name}@{i + 1}", f"{i + 1} of {_count(case)}/{given}") for i in range(_count(case))]

    def run(self, case: Case, target: Target, tick: Any) -> Iterator[Stage]:
        """Unlearn one request after the other, in the same weights."""
        import torch

        recipe, turn = recipe_for(target), _turns(case)
        forget = [target.question(row) for row in tested(case, "forget")]
        retain = [target.question(row) for row in tested(case, "retain")]
        unseen = [target.question(row) for row in tested(case, "holdout")]
        with torch.no_grad():
            losses = [float(target.loss([tokens])) * tokens.scored for tokens in unseen]
        level = -sum(losses) / sum(tokens.scored for tokens in unseen)
        stages = self.stages(case, target)
        for i, stage in enumerate(stages):
            asked = [tokens for tokens, request in zip(forget, turn, strict=True) if request == i]
            unlearn(
                target.model, asked, retain, level, recipe, seed=case.options.seed + i,
                tick=part_of(tick, i * recipe.most, len(stages) * recipe.most),
            )  # fmt: skip
            yield stage

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Relapse, beside forget degree and retained utility after every request."""
        stream, seed = _Stream(case, evidence), case.options.seed
        relapse = two_sample(*stream.relapse(), bounds=(-1.0, 1.0), seed=seed)
        groups = {f"request {i + 1}": stream.curve("forget", i) for i in range(stream.count)}
        groups |= {name: stream.curve(name) for name in ("holdout", "retain")}
        figure = curve_figure(
            "What is known after each deletion request", groups, range(1, stream.count + 1), _style, seed=seed
        ).model_copy(update={"x_label": "requests done"})
        return [
            Finding(
                id=f"{self.name}/relapse",
                instrument=self.name,
                question=self.question,
                statistic="continual unlearning: what comes back of earlier requests while later ones are unlearned",
                split=f"forget vs holdout, {stream.count} requests, original",
                estimate=relapse.value,
                ci95=(relapse.lo, relapse.hi),
                n=relapse.n,
                unit="accuracy",
                orientation="later requests bring back what earlier ones deleted",
                null="earlier requests change as facts that were never taught do",
                p_value=relapse.p_value,
                smallest_p=relapse.smallest_p,
                threshold=_THRESHOLD,
                noise=max(evidence.noise.values(), default=0.0),
                decides=(False, False),
                sides=(Side.NEITHER, Side.NEITHER),
                controls=[stream.done(), stream.kept()],
                reference=_SOURCE,
                figure=figure,
                table=Table(columns=["requests done", "of", "measure", "value", "95 % from", "to"], rows=stream.rows()),
            )
        ]


class _Stream:
    """What is known of every row before the first request (0) and after each."""

    def __init__(self, case: Case, evidence: Evidence) -> None:
        self.case, self.evidence, self.seed = case, evidence, case.options.seed
        self.count, self.turn = _count(case), _turns(case)
        self._roles = ["original", *(f"original+{Continual.name}@{i + 1}" for i in range(self.count))]

    def curve(self, name: str, request: int | None = None) -> Group:
        """Accuracy of a set, or of one request's rows, [rows, 1 + requests], and clusters."""
        values, rows = self._accuracy[name], tested(self.case, name)
        kept = np.ones(len(rows), dtype=bool) if request is None else self.turn == request
        return values[kept], [who for who, k in zip(self.case.clusters(rows), kept, strict=True) if k]

    def relapse(self) -> tuple[Floats, Floats, Sequence[str], Sequence[str]]:
        """Forget rows, but the last request's: the end less what was right after; holdout rows over the same spans."""
        values, clusters = self.curve("forget")
        earlier = self.turn < self.count - 1
        after = np.take_along_axis(values, 1 + self.turn[:, None], axis=1)[:, 0]
        unseen, theirs = self.curve("holdout")
        changed = unseen[:, -1] - unseen[:, 1:-1].mean(axis=1)
        mine = [who for who, k in zip(clusters, earlier, strict=True) if k]
        return (values[:, -1] - after)[earlier], changed, mine, theirs

    def done(self) -> Control:
        """Was there anything to relapse: what did each request take away?"""
        values, clusters = self.curve("forget")
        after = np.take_along_axis(values, 1 + self.turn[:, None], axis=1)[:, 0]
        lost = mean_estimate(values[:, 0] - after, clusters, bounds=(-1.0, 1.0), seed=self.seed)
        return Control(
            name="requests done",
            description="accuracy that forget rows lost by the time their own request was done: where nothing was "
            "deleted, nothing can relapse",
            estimate=lost.value,
            ci95=(lost.lo, lost.hi),
            n=lost.n,
            passed=lost.lo > 0 and lost.value >= _THRESHOLD,
            gates="silence",
        )

    def kept(self) -> Control:
        """What the whole stream cost."""
        values, clusters = self.curve("retain")
        lost = mean_estimate(values[:, 0] - values[:, -1], clusters, bounds=(-1.0, 1.0), seed=self.seed)
        return Control(
            name="retained facts lost",
            description="accuracy that retain rows lost by the end; unlearning trained on them too",
            estimate=lost.value,
            ci95=(lost.lo, lost.hi),
            n=lost.n,
        )

    def rows(self) -> Rows:
        """After each request: forget degree and retained utility, and accuracy on every request's rows."""
        model = "retrained" if "retrained" in self.case.models else "original"
        unseen = "forget" if model == "retrained" else "holdout"
        rows: Rows = []
        for i, role in enumerate(self._roles):
            so_far = self.turn < max(1, i)
            against = self._level(model, unseen, so_far if unseen == "forget" else None)
            forgotten = float(degree(self._level(role, "forget", so_far), against))
            useful = float(degree(self._level(role, "retain"), self._level(model, "retain")))
            rows += [[i, "requests so far", "forget degree", forgotten, None, None]] if i else []
            rows.append([i, "retain", "retained utility", useful, None, None])
            for label, (values, clusters) in (
                *((f"request {j + 1}", self.curve("forget", j)) for j in range(self.count)),
                *((name, self.curve(name)) for name in ("holdout", "retain")),
            ):
                found = mean_estimate(values[:, i], clusters, bounds=(0.0, 1.0), seed=self.seed)
                rows.append([i, label, "accuracy", found.value, found.lo, found.hi])
        return rows

    def _level(self, role: str, name: str, kept: NDArray[np.bool_] | None = None) -> float:
        """F, or R: the geometric mean of probability, match and accuracy over some rows of a set."""
        right = self.evidence.scores(role, f"{Continual.name}/{name}", "token")
        chosen = recalled(self.case, self.evidence, role, Continual.name, name)
        parts = np.array(
            [
                (np.exp(values["logprob"].mean()), values["match"].mean(), accuracy)
                for values, accuracy in zip(right, chosen, strict=True)
            ]
        )
        return float(np.prod((parts if kept is None else parts[kept]).mean(axis=0)) ** (1 / 3))

    @cached_property
    def _accuracy(self) -> dict[str, Floats]:
        return {
            name: np.stack(
                [recalled(self.case, self.evidence, role, Continual.name, name) for role in self._roles], axis=1
            )
            for name in _SETS
        }


def _count(case: Case) -> int:
    """Requests: each of at least two entities."""
    return min(_REQUESTS[case.options.budget.value], len(set(case.clusters(tested(case, "forget")))) // 2)


def _turns(case: Case) -> NDArray[np.intp]:
    """With which request each forget row is deleted, from 0 on."""
    return dealt(case.clusters(tested(case, "forget")), _count(case), case.options.seed)


def _style(label: str) -> str:
    return {"holdout": "control", "retain": "reference"}.get(label, "target")
