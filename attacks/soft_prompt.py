"""Soft prompt: is there a beginning, of vectors rather than words, after which forgotten facts are known again?

    e = argmin over e [k, width] of  - mean log p(answer token | e, prompt, answer so far),   Adam, from random tokens

The vectors are what `inputs_embeds` takes; the weights stay as they are. Of all prompts this is the strongest, for a
vector need be no word's, and its gradient is exact. What it is found on, and asked of, and compared with, is said in
`attacks.optimised`.

Source: Schwinn et al. 2024, Soft Prompt Threats (arXiv 2402.09063): embedding attacks on unlearned models; prompt
tuning: Lester et al. 2021 (arXiv 2104.08691). There an attack is optimised for each question and judged on the same;
here it is universal, and judged on entities it never saw.

Traps:

- *Vectors can carry facts*: k vectors of a wide model hold more than the rows they were found on say. Hence the halves.
- *The step has a scale*: embeddings are a hundred times longer in one model than in another, so the learning rate is in
  units of their root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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

__all__ = ["SoftPrompt", "optimise_soft_prompt", "virtual"]

_SOURCE = "Schwinn et al. 2024, arXiv 2402.09063"


@dataclass(frozen=True)
class Recipe:
    """The budget.

    Attributes:
        length: vectors.
        steps: of Adam.
        batch: rows a step.
        learning_rate: in units of the embeddings' root mean square.
    """

    length: int
    steps: int
    batch: int
    learning_rate: float


def optimise_soft_prompt(
    model: Any,
    rows: Sequence[Tokens],
    *,
    tokens: int = 4,
    steps: int = 40,
    learning_rate: float = 0.1,
    seed: int = 0,
    batch: int = 32,
    first: int | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Vectors [tokens, width] after which the scored tokens of the rows are likelier; see `virtual` for their use.

    Args:
        model: a Hugging Face causal model; it is not altered.
        rows: drawn in batches, reshuffled when exhausted.
        learning_rate: of Adam, in units of the embeddings' root mean square.
        first: the token that stays before the vectors (BOS).
    """
    import torch

    rng, table = np.random.default_rng(seed), embeddings(model)
    vectors = table[torch.from_numpy(rng.choice(len(table), tokens)).to(table.device)].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=learning_rate * float(table.square().mean().sqrt()))
    source = endless(rows, rng)
    for step in range(1, steps + 1):
        with virtual(model, vectors) as ids:
            loss = text_loss(model, [prefixed(next(source), ids, first) for _ in range(batch)])
        (vectors.grad,) = torch.autograd.grad(loss, [vectors])
        optimizer.step()
        if tick is not None:
            tick(step, steps)
    return vectors.detach()


class SoftPrompt(Optimised):
    """Do untaught facts come back after vectors that were optimised on others?"""

    name = "soft-prompt"
    title = "Does it come back after an optimised soft prompt?"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "soft prompt: right answers preferred after vectors that were optimised on other facts",
        "accuracy", "an optimised prompt brings forgotten facts back", (0.0, 1.0), THRESHOLD, _SOURCE,
    )  # fmt: skip

    def recipe(self, case: Case, target: Target) -> Recipe:
        """Four vectors; steps by budget."""
        steps = {"quick": 20, "standard": 40, "thorough": 120}[case.options.budget.value]
        return Recipe(4, steps, 32 if target.inventory.parameters < 2e7 else 16, 0.1)

    def cost(self, case: Case, target: Target) -> str:
        """Steps, and rows a step."""
        recipe, runs = self.recipe(case, target), len(self.taught_halves(case))
        return f": {recipe.length} vectors, {runs} times {recipe.steps} steps on {recipe.batch} rows"

    def found(
        self, case: Case, target: Target, rows: Sequence[Tokens], tick: Any
    ) -> AbstractContextManager[tuple[int, ...]]:
        """By `optimise_soft_prompt`."""
        recipe = self.recipe(case, target)
        vectors = optimise_soft_prompt(
            target.model,
            rows,
            tokens=recipe.length,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            seed=case.options.seed,
            batch=recipe.batch,
            first=target.tokenizer.bos_token_id,
            tick=tick,
        )
        return virtual(target.model, vectors)
