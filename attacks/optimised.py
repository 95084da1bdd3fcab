"""Attacks by optimised prompts: a beginning that makes a model answer, found on some facts and tried on others.

    recovered_g = share of the other half of group g whose right answer is preferred after prefix + prompt
    finding     = recovered_forget - recovered_holdout,   g = forget, holdout

No weight is touched. A prefix is optimised so that the right answers of half of the forget, the holdout and the retain
entities become likely after it; then the *other* halves are asked with the prefix before them, and the halves are
exchanged. Enough budget extracts anything from anything, so the holdout facts, which were never taught, are in the very
same optimisation: its budget is theirs by construction. And because tested facts share no entity with those the
prefix was found on, it can carry no answer to them: it can only unlock what is there. Where a retrained model is at
hand, a prefix is found for it in the same way, and its difference taken off.

Whatever the prefix is made of, it goes through the model as tokens: those that no vocabulary has, vectors, are given
ids beyond its end (`virtual`). What is found is another prefix for every model, so the passes after it are made, and
recorded, by the attack itself.

Traps:

- *What was there before did not come back*: a control asks what the forget facts gained by the prefix over what the
  holdout facts did.
- *A prefix can destroy*: the retain half that it was not found on is the positive control. The longer, the more: of
  4, 8 and 16 vectors, 4 left most of it standing (the only thing that the length was chosen by).
- *Answers have a form*: a prefix that makes any model choose among cities rather than animals raises all groups alike;
  only the difference counts.
- *Silence is weak*: the budget is small, the search local, and a prefix is one way in of many.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attacks.recall import SETS, Floats, came_back, questions, recalled, tested
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.errors import BadInput
from audit.evidence import Arrays, Evidence
from audit.instrument import Access, Attack, Stage
from audit.plan import Request, Work, merge
from audit.progress import part_of
from audit.record import Finding, Question, Side
from audit.statistics import halves
from audit.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from audit.target import Target

__all__ = ["THRESHOLD", "Optimised", "embeddings", "prefixed", "recorded", "virtual"]

_HALVES = ("a", "b")
_FEWEST = 4  # entities: half are optimised on, and the rest need an interval

THRESHOLD = 0.15
"""As of the attacks on weights."""


def embeddings(model: Any) -> Tensor:
    """What each token of the vocabulary puts into a Hugging Face causal model, [vocabulary, width], float32."""
    import torch

    module = model.get_input_embeddings()
    with torch.no_grad():
        found: Tensor = module(torch.arange(module.weight.shape[0], device=module.weight.device))
    return found.float()


@contextmanager
def virtual(model: Any, vectors: Tensor) -> Iterator[tuple[int, ...]]:
    """Within, the model takes tokens more: `vectors` [k, width], under the ids that are yielded.

    They lie beyond the vocabulary, and stand for what `inputs_embeds` would hold there; gradients reach `vectors`.
    """
    import torch

    module = model.get_input_embeddings()
    size = module.weight.shape[0]
    seen: list[Tensor] = []

    def before(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0] - size)
        return (args[0].clamp(max=size - 1), *args[1:])

    def after(_module: object, _args: object, found: Tensor) -> Tensor:
        place = seen.pop()
        return torch.where((place >= 0)[..., None], vectors.to(found.dtype)[place.clamp(min=0)], found)

    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    try:
        yield tuple(range(size, size + len(vectors)))
    finally:
        for handle in handles:
            handle.remove()


def prefixed(tokens: Tokens, prefix: Sequence[int], first: int | None = None) -> Tokens:
    """The same sequence after a prefix; `first` is a token (BOS) that stays before it where the sequence has it."""
    at = int(tokens.ids[0] == first)
    return Tokens((*tokens.ids[:at], *prefix, *tokens.ids[at:]), tokens.start + len(prefix), tokens.rivals)


def recorded(
    target: Target, requests: Sequence[Request], prefix: Sequence[int]
) -> list[tuple[Tokens, Mapping[str, Arrays]]]:
    """What the requests ask for, of their sequences after a prefix; each under the sequence without it."""
    from audit.capture import Engine

    first, engine = target.tokenizer.bos_token_id, Engine(target)
    asked = [(work.tokens, prefixed(work.tokens, prefix, first), work.quantities) for work in merge(requests)]
    plain = {moved.key: tokens for tokens, moved, _ in asked}
    batches = engine.batches([Work(moved, quantities) for _, moved, quantities in asked])
    return [(plain[row.tokens.key], row.values) for batch in batches for row in engine.run(batch)]


class Optimised(Attack):
    """An attack by an optimised prefix; a subclass says by which."""

    question = Question.RECOVERY
    access = Access.WEIGHTS
    sets = ("forget", "retain", "holdout")
    statistic: ClassVar[Statistic]

    @abstractmethod
    def recipe(self, case: Case, target: Target) -> Any:
        """The budget: all that determines the prefix besides model, rows and seed; has `length` (tokens), `steps`."""

    @abstractmethod
    def found(
        self, case: Case, target: Target, rows: Sequence[Tokens], tick: Any
    ) -> AbstractContextManager[tuple[int, ...]]:
        """Optimise a prefix on rows; its token ids, for as long as the model takes them."""

    def missing(self, case: Case) -> str | None:
        """Halves need at least four entities a group."""
        for name in self.sets:
            if name in case.sets and len(set(case.clusters(tested(case, name)))) < _FEWEST:
                return f"needs at least {_FEWEST} entities in the {name} set to optimise on half of them"
        return super().missing(case)

    def attacked(self, case: Case) -> tuple[str, ...]:
        """The target, and the retrained model as its never-taught control."""
        return tuple(role for role in ("target", "retrained") if role in case.models)

    def taught_halves(self, case: Case) -> tuple[str, ...]:
        """Those a prefix is optimised on: one, or both in turn."""
        return _HALVES[:1] if case.options.budget.value == "quick" else _HALVES

    def requests(self, case: Case, target: Target) -> list[Request]:
        """Is the right answer preferred? Of the model with the prefix the attack says so itself."""
        return questions(case, target, self.name) if target.role.split("+")[0] in self.attacked(case) else []

    def stages(self, case: Case, target: Target) -> list[Stage]:
        """One a half."""
        if target.role not in self.attacked(case):
            return []
        sets = ",".join(case.sets[name].digest for name in SETS)
        options = case.options
        given = f"{self.recipe(case, target)}/{options.budget.value}/{options.seed}/{target.template}/{sets}"
        return [Stage(f"{self.name}@{half}", f"{given}/{half}") for half in self.taught_halves(case)]

    def run(self, case: Case, target: Target, tick: Any) -> Iterator[Stage]:
        """Optimise a prefix on half a, ask everything after it; then half b."""
        requests, stages = self.requests(case, target), self.stages(case, target)
        longest = max(len(tokens.ids) for request in requests for tokens in request.sequences)
        length, steps = (recipe := self.recipe(case, target)).length, recipe.steps
        if longest + length > target.context_length:
            raise BadInput(
                f"{target.inventory.root}: a row of {longest} tokens leaves no room for a prefix of {length} in a "
                f"context of {target.context_length}"
            )
        for i, (half, stage) in enumerate(zip(self.taught_halves(case), stages, strict=True)):
            rows = [
                target.question(row)
                for name in SETS
                for row, taught in zip(tested(case, name), _taught(case, name, half), strict=True)
                if taught
            ]
            with self.found(case, target, rows, part_of(tick, i * steps, len(stages) * steps)) as prefix:
                kept = recorded(target, requests, prefix)
            yield Stage(stage.name, stage.recipe, kept)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The halves that the prefix was not found on."""

        def score(role: str, name: str) -> Floats:
            """Is the right answer of every tested row preferred, without and with the prefix? [rows, 2]."""
            parts = []
            for half in self.taught_halves(case):
                ways = [recalled(case, evidence, r, self.name, name) for r in (role, f"{role}+{self.name}@{half}")]
                parts.append(np.stack(ways, axis=1)[~_taught(case, name, half)])
            return np.concatenate(parts)

        rows = {
            name: tuple(
                row
                for half in self.taught_halves(case)
                for row, taught in zip(tested(case, name), _taught(case, name, half), strict=True)
                if not taught
            )
            for name in SETS
        }
        finding = against_never_taught(
            self, case, evidence, self.statistic, score, columns=(self.name, ["without", "with the prefix"]),
            aggregate=lambda both: both[:, 1], rows=rows, roles=self.attacked(case),
            # Where forget rows stay below holdout rows, an edit of the output still holds: no reason for alarm.
            sides=(Side.REMAINS, Side.NEITHER),
        )  # fmt: skip
        finding.controls.append(came_back(case, rows, lambda name: np.diff(score("target", name), axis=1)[:, 0]))
        return [finding]


def _taught(case: Case, name: str, half: str) -> NDArray[np.bool_]:
    """Which of a set's tested rows a prefix is optimised on."""
    return np.asarray(halves(case.clusters(tested(case, name)), case.options.seed) == (half == "a"))
