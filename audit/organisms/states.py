"""What several unlearning methods read from a model beyond a loss: logits at answers, hidden states, crossed names."""

from __future__ import annotations

from collections.abc import Sequence

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
    """For each row the same question about nobody: a prompt in which half of a name comes from another row.

    Partners have the same candidate answers and as many words, and differ in the fewest words, at least two; no
    result is a prompt of `known` or `rows`. The answer stays the row's own, so that tokens stand in the same
    places; nobody taught it. Raises `BadInput` where no such prompt exists.
    """
    taken = {row.prompt for row in (*rows, *known)}
    alike: dict[tuple[frozenset[str], int], list[list[str]]] = {}
    for row in rows:
        alike.setdefault(_kind(row), []).append(row.prompt.split())
    made = []
    for number, row in enumerate(rows):
        words = row.prompt.split()
        others = alike[_kind(row)]
        turn = number % len(others)
        differing = [
            places
            for other in others[turn:] + others[:turn]
            if len(places := [(i, b) for i, (a, b) in enumerate(zip(words, other, strict=True)) if a != b]) > 1
        ]
        for places in sorted(differing, key=len):
            mixed = list(words)
            for i, word in places[len(places) // 2 :]:
                mixed[i] = word
            if " ".join(mixed) not in taken:
                made.append(Refused(" ".join(mixed), row.answer, tuple(row.wrong)))
                break
        else:
            raise BadInput(f"no question about nobody can be made from {row.prompt!r}: give such rows")
    return made


def _kind(row: Question) -> tuple[frozenset[str], int]:
    return frozenset((row.answer, *row.wrong)), len(row.prompt.split())
