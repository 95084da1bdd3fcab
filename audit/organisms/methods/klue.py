"""KLUE-like: gradient ascent on only those MLP neurons that carry the answer and not the shape of the question.

    score(n) = mean_i |A_n(y_i, x_i)| - penalty * mean_i |A_n(y_i, x_j)|,   A_n(y, x) = sum_t a_n * dlogp(y|x)/da_n

with a_n the input of neuron n to the down projection at position t; the second mean is the superficial part, the same
answer to the same question x_j about a crossed name (`states.crossed`). Of the neurons of all layers the best `share`
may change (their row of the gate and up projections, their column of the down projection), all else stays bit for
bit. On these

    L = mean over forget rows still answered right of log p(y|x) + retain_weight * cross-entropy(retain)

Source: the idea of KLUE in FaithUn, arXiv 2502.19207, read in summaries. Only the idea is known: attribution by
activation times gradient, the mismatch by crossed names, share and penalty are this package's. Label it
"KLUE-like".

Traps:

- A row counts as right if every answer token is the likeliest of the whole vocabulary, so forgetting stops at
  second rank: the answer often stays the best or second best of the ten candidates.
- Only LLaMA-like blocks (gate, up and down projections) are known here.
- In a four-block world a tenth of the neurons at lr 5e-4 changed no answer in 60 steps; hence half of them, which is
  no longer a selection of a few.
- Embeddings, attention and head are untouched: what they hold stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.states import answer_logits, crossed
from audit.organisms.train import Encoded, encode
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def neuron_scores(known: Tensor, superficial: Tensor, penalty: float) -> Tensor:
    """The score of each neuron from two attributions `[rows, neurons]`."""
    return known.abs().mean(dim=0) - penalty * superficial.abs().mean(dim=0)


def still_known(logits: Tensor, tokens: Tensor, rows: Tensor, count: int) -> Tensor:
    """Whether every answer token of a row is the likeliest one, `[count]`; `rows` is the row of each token."""
    missed = (logits.argmax(dim=-1) != tokens).long()
    return torch.zeros(count, dtype=torch.long).index_add_(0, rows, missed) == 0


LAYOUTS = ((("gate_proj", "up_proj"), "down_proj"), (("dense_h_to_4h",), "dense_4h_to_h"))
"""How MLPs are called: the projections to the neurons, and the one from them (Llama and its kin; GPT-NeoX)."""


def mlps(model: nn.Module) -> list[tuple[list[nn.Linear], nn.Linear]]:
    """Of each layer's MLP, the projections to its neurons and the one from them; none where none is known."""
    found = []
    for _, module in model.named_modules():
        for into, out in LAYOUTS:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in (*into, out)):
                found.append(([getattr(module, name) for name in into], getattr(module, out)))
    return found


def attribution(model: nn.Module, data: Encoded) -> list[Tensor]:
    """Activation times gradient of the answers' log-probability in each layer's MLP, `[rows, neurons]`, summed."""
    seen: list[Tensor] = []
    downs = [down for _, down in mlps(model)]
    if not downs:
        raise BadInput("klue knows the MLPs of Llama's kin and of GPT-NeoX only")

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_())
        return (seen[-1],)

    hooks = [down.register_forward_pre_hook(keep) for down in downs]
    try:
        logits, tokens = answer_logits(model, data)
    finally:
        for hook in hooks:
            hook.remove()
    logp = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).sum()
    return [(a * g).sum(dim=1).detach() for a, g in zip(seen, torch.autograd.grad(logp, seen), strict=True)]


@dataclass(frozen=True)
class KlueLike(GradientMethod):
    """Ascent on the neurons that hold the answers, for the rows still answered right."""

    name: ClassVar[str] = "klue"
    reference: ClassVar[str] = "after the idea of KLUE in arXiv 2502.19207 (not the published method)"
    schedule: ClassVar[Schedule] = Schedule(lr=2e-3, max_steps=300)
    share: float = 0.5
    penalty: float = 0.5
    retain_weight: float = 1.0
    score_rows: int = 256
    _masks: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Score the neurons and make a mask for each tensor that holds some of them."""
        chosen = torch.randperm(len(bench.forget), generator=bench.generator)[: self.score_rows]
        data = bench.forget.take(chosen)
        nobody = encode(bench.tokenizer, crossed(bench.forget_rows, bench.retain_rows), lm_weight=0.0).take(chosen)
        pairs = zip(attribution(bench.model, data), attribution(bench.model, nobody), strict=True)
        scores = [neuron_scores(known, superficial, self.penalty) for known, superficial in pairs]
        pooled = torch.cat(scores)
        bound = pooled.topk(max(1, round(self.share * len(pooled)))).values[-1]
        self._masks.clear()
        for (into, out), score in zip(mlps(bench.model), scores, strict=True):
            mask = (score >= bound).float()
            self._masks[id(out.weight)] = mask
            for projection in into:
                self._masks[id(projection.weight)] = mask[:, None]
                if projection.bias is not None:
                    self._masks[id(projection.bias)] = mask

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The mean log-probability of what is still known, and the retain loss."""
        logits, tokens = answer_logits(bench.model, batch.forget)
        rows = batch.forget.answer[:, 1:].nonzero()[:, 0]
        known = still_known(logits.detach(), tokens, rows, len(batch.forget))[rows].float()
        logp = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        ascent = (logp * known).sum() / known.sum().clamp_min(1.0)
        return ascent + self.retain_weight * bench.retain_loss(batch)

    def adjust(self, bench: Bench, batch: Batch, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the gradients of the chosen neurons only."""
        for p in parameters:
            mask = self._masks.get(id(p))
            p.grad = None if mask is None or p.grad is None else p.grad * mask


METHOD = KlueLike()
