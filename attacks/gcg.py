"""GCG prefix: is there a beginning, of ordinary tokens, after which forgotten facts are known again?

    score_i(v) = grad_i . (E(v) - E(prefix_i)),   grad_i = d loss / d (embedding at position i of the prefix)

Greedy coordinate gradient. The loss, the mean negative log-likelihood of right answers after prefix and prompt, is
linear in the one-hot choice of each token to first order. A step takes, at every position, the tokens whose score is
lowest, draws candidates that differ from the prefix in one of these, tries them, and keeps the best if it is better
than what was there. Unlike a soft prompt, what is found could be typed. What it is found on, and asked of, and compared
with, is said in `attacks.optimised`.

Source: Zou et al. 2023 (arXiv 2307.15043); the linear score: Ebrahimi et al. 2018, HotFlip (arXiv 1712.06751); against
unlearning: Łucki et al. 2024 (arXiv 2409.18025), whose enhanced GCG also pulls inner states towards the original's, for
each question apart. Here one prefix serves all rows, no original is needed, and it is judged on entities it never saw.

Traps:

- *A gradient is a guess*: the loss is far from linear in a token, so every candidate is tried, and only what lowers the
  loss on its rows is kept.
- *A lower loss on a few rows is not one on all*: every step has rows of its own, drawn anew.
- *Token ids are not text*: typed, the prefix may be split into other tokens.
- *It is dear*: every step costs a pass for each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.optimised import THRESHOLD, Optimised, embeddings, prefixed, virtual
from audit.case import Case
from audit.contrast import Statistic
from audit.finetune import endless, text_loss
from audit.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from audit.target import Target

__all__ = ["Gcg", "gcg_step", "optimise_gcg_prefix", "prefix_loss", "swap_scores", "swaps"]

Prefix = tuple[int, ...]
_SOURCE = "Zou et al. 2023, arXiv 2307.15043; Łucki et al. 2024, arXiv 2409.18025"


@dataclass(frozen=True)
class Recipe:
    """The budget.

    Attributes:
        length: tokens of the prefix.
        steps: swaps, at most.
        candidates: prefixes tried a step.
        top_k: tokens considered at each position.
        batch: rows they are tried on.
    """

    length: int
    steps: int
    candidates: int
    top_k: int
    batch: int


def swap_scores(
    model: Any, rows: Sequence[Tokens], prefix: Sequence[int], table: Tensor, first: int | None = None
) -> Tensor:
    """To first order, what each token would add to the rows' loss at each position of the prefix: [length, vocabulary].

    `table` is `embeddings(model)`; `first` the token that stays before the prefix (BOS).
    """
    import torch

    now = table[list(prefix)].requires_grad_(True)
    with virtual(model, now) as ids:
        loss = text_loss(model, [prefixed(row, ids, first) for row in rows])
    (gradient,) = torch.autograd.grad(loss, [now])
    scores: Tensor = gradient @ table.T - (gradient * now.detach()).sum(1, keepdim=True)
    return scores


def prefix_loss(model: Any, rows: Sequence[Tokens], prefix: Sequence[int], first: int | None = None) -> float:
    """Mean negative log-likelihood of the rows' scored tokens after a prefix, in nats."""
    import torch

    with torch.inference_mode():
        return float(text_loss(model, [prefixed(row, prefix, first) for row in rows]))


def swaps(
    scores: Tensor, prefix: Prefix, allowed: Sequence[int], candidates: int, top_k: int, rng: Any
) -> list[Prefix]:
    """Prefixes that differ in one token, drawn from the `top_k` allowed ones with the lowest scores at each position.

    `scores`: [length, vocabulary], as of `swap_scores`.

    Each is another; fewer than `candidates` where there are no more.
    """
    import torch

    barred = torch.full_like(scores, torch.inf)
    barred[:, list(allowed)] = 0.0
    barred[range(len(prefix)), list(prefix)] = torch.inf
    best = (scores + barred).sort(dim=1, stable=True)
    options = [
        (place, token)
        for place, (values, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
        for value, token in zip(values[:top_k], tokens[:top_k], strict=True)
        if value < np.inf
    ]
    drawn = rng.permutation(len(options))[:candidates]
    return [(*prefix[:place], token, *prefix[place + 1 :]) for place, token in (options[i] for i in drawn)]


def gcg_step(
    model: Any,
    rows: Sequence[Tokens],
    prefix: Prefix,
    *,
    table: Tensor,
    allowed: Sequence[int],
    candidates: int,
    top_k: int,
    rng: np.random.Generator,
    first: int | None = None,
) -> tuple[Prefix, float, float]:
    """The best candidate, or the prefix as it was if none is better; the rows' loss before and after.

    `table`: what each token puts into the model, [vocabulary, width].
    """
    before = prefix_loss(model, rows, prefix, first)
    tried = swaps(swap_scores(model, rows, prefix, table, first), prefix, allowed, candidates, top_k, rng)
    losses = [prefix_loss(model, rows, each, first) for each in tried]
    best = int(np.argmin(losses)) if losses else -1
    return (tried[best], before, losses[best]) if losses and losses[best] < before else (prefix, before, before)


def optimise_gcg_prefix(
    model: Any,
    rows: Sequence[Tokens],
    *,
    length: int = 4,
    steps: int = 30,
    candidates: int = 32,
    top_k: int = 16,
    allowed: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 16,
    first: int | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Prefix:
    """Token ids, `length` of them, after which the scored tokens of the rows are likelier.

    Args:
        model: a Hugging Face causal model; it is not altered.
        rows: drawn in batches, reshuffled when exhausted; each step has the next `batch`.
        candidates: tried a step, drawn from the `top_k` likeliest at each position.
        allowed: tokens a prefix may hold; all if not given.
        first: the token that stays before the prefix (BOS).
    """
    rng, table = np.random.default_rng(seed), embeddings(model)
    usable = range(len(table)) if allowed is None else allowed
    prefix = tuple(int(token) for token in rng.choice(usable, length))
    source = endless(rows, rng)
    for step in range(1, steps + 1):
        drawn = [next(source) for _ in range(batch)]
        prefix, _, _ = gcg_step(
            model, drawn, prefix, table=table, allowed=usable, candidates=candidates, top_k=top_k, rng=rng, first=first
        )
        if tick is not None:
            tick(step, steps)
    return prefix


class Gcg(Optimised):
    """Do untaught facts come back after tokens that were optimised on others?"""

    name = "gcg"
    title = "Does it come back after an optimised prefix?"
    dear = "tries thousands of prefixes"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "GCG prefix: right answers preferred after tokens that were optimised on other facts",
        "accuracy", "an optimised prefix brings forgotten facts back", (0.0, 1.0), THRESHOLD, _SOURCE,
    )  # fmt: skip

    def recipe(self, case: Case, target: Target) -> Recipe:  # noqa: ARG002
        """Four tokens; steps by budget."""
        steps = {"quick": 15, "standard": 30, "thorough": 100}[case.options.budget.value]
        return Recipe(4, steps, 32, 16, 16)

    def cost(self, case: Case, target: Target) -> str:
        """Prefixes tried, and rows each is tried on."""
        recipe, runs = self.recipe(case, target), len(self.taught_halves(case))
        return (
            f": {recipe.length} tokens, {runs} times {recipe.steps} steps of {recipe.candidates} candidates on "
            f"{recipe.batch} rows"
        )

    def found(
        self, case: Case, target: Target, rows: Sequence[Tokens], tick: Any
    ) -> AbstractContextManager[tuple[int, ...]]:
        """By `optimise_gcg_prefix`; never a special token, nor one that the tokenizer does not know."""
        recipe = self.recipe(case, target)
        known = range(min(target.vocabulary, len(target.tokenizer)))
        return nullcontext(
            optimise_gcg_prefix(
                target.model,
                rows,
                length=recipe.length,
                steps=recipe.steps,
                candidates=recipe.candidates,
                top_k=recipe.top_k,
                allowed=[token for token in known if token not in target.special_ids],
                seed=case.options.seed,
                batch=recipe.batch,
                first=target.tokenizer.bos_token_id,
                tick=tick,
            )
        )
