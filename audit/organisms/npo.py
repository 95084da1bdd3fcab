"""Negative preference optimization: unlearning by making the known answers unlikely, more gently than ascent.

For a forget row with prompt x and answer y, `log p(y|x)` being the *sum* over the answer's tokens,

    L_forget = -(2 / beta) * mean_i log sigmoid(-beta * (log p(y_i|x_i) - log p_ref(y_i|x_i)))
    L        = L_forget + retain_weight * cross-entropy(retain)

where the reference is the model as it was before. At the start the loss is (2 / beta) * log 2, and the pull
on `log p(y_i|x_i)` has weight 2 * sigmoid(beta * (log p - log p_ref)): 1 at first, falling as the answer
becomes unlikely, which is why it collapses later than gradient ascent (its limit for beta -> 0). Zhang et al.
2024, arXiv:2404.05868.

Traps:

- Several copied code bases call "NPO" a loss over the raw logits of all vocabulary entries, without
  log-softmax or labels. That mostly shifts logits, which softmax cancels. This is the sequence form.
- beta multiplies a summed log-ratio: with long answers the same beta saturates sooner.
- Stopped on the forget set alone it leaves the retain set broken; run on after both are met it drives the
  forget loss far beyond a never-taught model's (over-unlearning), where even relearning no longer finds what
  was there. So it stops as soon as forget accuracy is low *and* retain accuracy is high.
- The more layers it may change, the less of the knowledge it leaves to be found again; `trainable` limits it
  to some, and the history must say so.
- What it leaves behind has no ground truth: the label is the method, not "suppressed" or "deleted".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from audit.organisms.train import (
    Progress,
    Question,
    answer_logprobs,
    candidate_accuracy,
    encode,
    finite,
    sequence_logprobs,
    weighted_loss,
)


@dataclass(frozen=True, slots=True)
class Unlearning:
    """How an unlearning run went."""

    steps: int
    stopped: bool
    """Whether both goals were met; otherwise the steps ran out."""
    forget_accuracy: float
    retain_accuracy: float
    losses: tuple[float, ...]


def npo_loss(logp: Tensor, logp_ref: Tensor, beta: float) -> Tensor:
    """NPO's forget loss, a scalar, from the answers' log-probabilities `[rows]` now and in the reference."""
    # softplus(z) is -log sigmoid(-z), and does not overflow.
    return (2.0 / beta) * F.softplus(beta * (logp - logp_ref)).mean()


def unlearn_npo(
    model: nn.Module,
    reference: nn.Module,
    forget_rows: Sequence[Question],
    retain_rows: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    forget_test: Sequence[Question],
    retain_test: Sequence[Question],
    seed: int,
    trainable: Callable[[str], bool] | None = None,
    lr: float = 2e-4,
    beta: float = 0.1,
    retain_weight: float = 4.0,
    batch: int = 32,
    max_steps: int = 400,
    check_every: int = 10,
    forget_goal: float = 0.12,
    retain_goal: float = 0.95,
    warmup: int = 10,
    progress: Progress | None = None,
) -> Unlearning:
    """Unlearn `forget_rows` from a model in place, stopping early.

    Every step takes `batch` forget rows and `batch` retain rows. Every `check_every` steps the candidate
    accuracy on `forget_test` must be at most `forget_goal`, and on `retain_test` at least `retain_goal`, for
    the run to stop. `reference` is the frozen model before unlearning; its scores are taken once. `trainable`
    picks the parameters to change by name, all by default: the others stay bit for bit what they were.
    """
    forget, retain = encode(tokenizer, forget_rows, lm_weight=0.0), encode(tokenizer, retain_rows)
    reference_logp = answer_logprobs(reference, forget).clone()
    draw = torch.Generator().manual_seed(seed)
    forget_order, retain_order = _Cycle(len(forget), draw), _Cycle(len(retain), draw)
    changed = {id(p) for name, p in model.named_parameters() if trainable is None or trainable(name)}
    parameters = [p for p in model.parameters() if id(p) in changed]
    frozen = [p for p in model.parameters() if id(p) not in changed and p.requires_grad]
    # Weight decay would move weights that no gradient asks to move.
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses: list[float] = []
    stopped = False
    for p in frozen:
        p.requires_grad_(False)
    model.train()
    while len(losses) < max_steps and not stopped:
        step = len(losses)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup))
        index = forget_order.take(batch)
        logp = sequence_logprobs(model, forget.take(index))
        loss = npo_loss(logp, reference_logp[index], beta)
        loss = loss + retain_weight * weighted_loss(model, retain.take(retain_order.take(batch)))
        losses.append(finite(loss, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if len(losses) % check_every == 0:
            # The cheaper half first: the retain set is asked only once the forget set is quiet.
            stopped = (
                candidate_accuracy(model, tokenizer, forget_test) <= forget_goal
                and candidate_accuracy(model, tokenizer, retain_test) >= retain_goal
            )
        if progress is not None:
            progress(len(losses), max_steps)
    for p in frozen:
        p.requires_grad_(True)
    model.eval()
    return Unlearning(
        steps=len(losses),
        stopped=stopped,
        forget_accuracy=candidate_accuracy(model, tokenizer, forget_test),
        retain_accuracy=candidate_accuracy(model, tokenizer, retain_test),
        losses=tuple(losses),
    )


class _Cycle:
    """Row numbers in random order without replacement, reshuffled whenever they run out."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count, self._generator = count, generator
        self._left = torch.empty(0, dtype=torch.long)

    def take(self, size: int) -> Tensor:
        while len(self._left) < size:
            self._left = torch.cat([self._left, torch.randperm(self._count, generator=self._generator)])
        taken, self._left = self._left[:size], self._left[size:]
        return taken
