"""What several unlearning methods read from a model beyond a loss: logits at answers, hidden states, crossed names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.train import Encoded, Question
from audit.organisms.unlearn import Refused


def answer_logits(model: nn.Module, data: Encoded) -> tuple[Tensor, Tensor]:
    """The logits that predict each answer token, `[tokens, vocabulary]`, and the tokens, row after row.

    A logit row stands one position before its token: taking the mask unshifted flattens the wrong place.
    """
    mask = data.answer[:, 1:]
    logits: Tensor = model(input_ids=data.ids, use_cache=False).logits[:, :-1][mask]
    return logits.float(), data.ids[:, 1:][mask]


def prompt_states(model: nn.Module, data: Encoded) -> list[Tensor]:
    """The state after each block at the token before the answer, `[rows, width]` each; the last one is normed."""
    states = model(input_ids=data.ids, use_cache=False, output_hidden_states=True).hidden_states
    position = data.answer.int().argmax(dim=1) - 1
    return [state[torch.arange(len(data)), position].float() for state in states[1:]]


def crossed(rows: Sequence[Question], known: Sequence[Question]) -> list[Refused]:
    """For each row the same question about nobody: half of the name from one other row, half from a second.

    These two have the row's candidate answers and number of words, and differ from it in the same places, at least two
    and as few as can be; so nothing of the row's own name is left, which a model may know by its half. No result is a
    prompt of `known` or `rows`. The answer stays the row's own, so that tokens stand in the same places; nobody taught
    it. Raises `BadInput` where no such prompt exists.
    """
    taken = {row.prompt for row in (*rows, *known)}
    alike: dict[tuple[frozenset[str], int], list[list[str]]] = {}
    for row in rows:
        alike.setdefault(_kind(row), []).append(row.prompt.split())
    return [_crossed(row, number, alike[_kind(row)], taken) for number, row in enumerate(rows)]


def _crossed(row: Question, number: int, others: Sequence[Sequence[str]], taken: set[str]) -> Refused:
    words = row.prompt.split()
    turn = number % len(others)  # so that not every row takes the same partners
    partners: dict[tuple[int, ...], list[Sequence[str]]] = {}
    for other in [*others[turn:], *others[:turn]]:
        places = tuple(i for i, (a, b) in enumerate(zip(words, other, strict=True)) if a != b)
        if len(places) > 1:
            partners.setdefault(places, []).append(other)
    for places in sorted(partners, key=lambda found: (len(found), -len(partners[found]))):
        for left, right in permutations(partners[places], 2):
            mixed = list(words)
            for k, i in enumerate(places):
                mixed[i] = (left if k < len(places) // 2 else right)[i]
            if (prompt := " ".join(mixed)) not in taken:
                return Refused(prompt, row.answer, tuple(row.wrong))
    raise BadInput(f"no question about nobody can be made from {row.prompt!r}: give such rows")


def _kind(row: Question) -> tuple[frozenset[str], int]:
    return frozenset((row.answer, *row.wrong)), len(row.prompt.split())
