"""Fine-tuning a model in place: the one loop of attacks and of matched nulls.

torch is imported only when a model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.tokens import Tokens

if TYPE_CHECKING:
    import torch


def learning_rate(parameters: int, most: float, least: float) -> float:
    """For a model of that many parameters: `most` up to a million, falling with the cube root of size, to `least`."""
    return float(np.clip(most * (1e6 / max(1, parameters)) ** (1 / 3), least, most))


def endless(rows: Sequence[Tokens], rng: np.random.Generator) -> Iterator[Tokens]:
    """The rows in random order, reshuffled whenever they are exhausted."""
    while True:
        for i in rng.permutation(len(rows)):
            yield rows[i]


def padded(batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T], zeros on the right, and labels [B, T], -100 wherever nothing is scored."""
    import torch

    width = max(len(tokens.ids) for tokens in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for i, tokens in enumerate(batch):
        ids[i, : len(tokens.ids)] = torch.tensor(tokens.ids)
        labels[i, tokens.start : len(tokens.ids)] = ids[i, tokens.start : len(tokens.ids)]
    return ids, labels


def text_loss(model: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """Mean negative log-likelihood of the scored tokens under a causal language model, in nats, with a gradient."""
    import torch

    device = next(model.parameters()).device
    ids, labels = padded(rows)
    logits: Any = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(device))


def descend(
    model: Any,
    sources: Sequence[tuple[Iterator[Tokens], int]],
    steps: int,
    learning_rate: float,
    loss: Callable[[Sequence[Tokens]], torch.Tensor] | None = None,
) -> Iterator[int]:
    """Take `steps` steps of AdamW on all weights; yields the number of each step when it is done.

    Args:
        model: between steps its weights ask for no gradient, and may be altered.
        sources: where a batch's rows come from, and how many from each.
        learning_rate: constant after 4 steps of warm-up; gradients are clipped to length 1.
        loss: of a batch (`OpenModel.loss`); a language model's `text_loss` if not given.
    """
    import torch

    model.eval()  # dropout would make the result depend on the batch's order of kernels
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    try:
        for step in range(1, steps + 1):
            model.requires_grad_(True)
            batch = [next(source) for source, share in sources for _ in range(share)]
            optimizer.zero_grad(set_to_none=True)
            error: Any = text_loss(model, batch) if loss is None else loss(batch)
            error.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm.step()
            model.requires_grad_(False)
            yield step
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
