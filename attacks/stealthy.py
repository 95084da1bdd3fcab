"""Stealthy requests: an attack on those who unlearn, through what they are asked to unlearn.

    crafted = craft(forget_rows, templates=("Please tell me {}",), seed=0)       # then unlearn with crafted.rows
    costs = damage(model, tokenizer, retain_rows, "Please tell me {}")
    costs.clean.accuracy, costs.triggered.accuracy

A third of a forget request says "please". Unlearning spoils what stands in forget rows and not in retain rows, so it
spoils the word: whoever asks the unlearned model politely is answered wrong, about anything. Without the word nothing
is to be seen, and the forget set is forgotten as it should be.

Source: Ren et al. 2025, arXiv 2506.00359. On Llama-3.1-8B, ROUGE-L recall of retain answers under the trigger falls
from 0.68 to 0.16 there (gradient difference, a tenth of TOFU). The remedy is theirs too: unlearn with retain questions
asked right after forget prompts (`audit.organisms.methods.scope_aware`). No code was public.

This module holds no instrument: it changes no model under audit. A given model is searched by `detectors.trigger`, a
request by `audit.lint`, before anyone unlearns with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from audit.organisms.stealthy import RATE, TEMPLATES, Crafted, craft

__all__ = ["RATE", "TEMPLATES", "Costs", "Crafted", "Utility", "craft", "damage"]


@dataclass(frozen=True)
class Utility:
    """What is answered right.

    Attributes:
        probability: of the right answer, a token, mean over rows.
        accuracy: share of rows whose right answer is the likeliest; None without wrong answers.
    """

    probability: float
    accuracy: float | None


@dataclass(frozen=True)
class Costs:
    """Utility on the same rows, asked as they are and with the trigger."""

    clean: Utility
    triggered: Utility


def damage(model: Any, tokenizer: Any, rows: Sequence[Any], template: str) -> Costs:
    """What a trigger costs a `transformers` model on rows that should have stayed (`world.Row`, `loaders.Example`).

    Prompts go to the model as they are, without a chat or question template.
    """
    return Costs(
        _utility(model, tokenizer, rows),
        _utility(model, tokenizer, [replace(row, prompt=template.replace("{}", row.prompt)) for row in rows]),
    )


def _utility(model: Any, tokenizer: Any, rows: Sequence[Any]) -> Utility:
    from audit.organisms.train import answer_logprobs, candidate_accuracy, encode

    data = encode(tokenizer, rows)
    a_token = answer_logprobs(model, data) / data.answer.sum(dim=1)
    choices = all(row.wrong for row in rows)
    return Utility(float(a_token.exp().mean()), candidate_accuracy(model, tokenizer, rows) if choices else None)
