"""SAE-guided-like unlearning: make the forget entities look unknown in the features of a sparse autoencoder.

A top-k autoencoder is trained on the states of one block, at the last token of prompts about taught and about crossed,
never taught names. K are the features that are active more often for taught ones, by the largest gap in frequency,
U those active more often for unknown ones. With a(h) the features' values before the choice of the k largest,

    L = weight * (|a_K(h)|^2 + |a_U(h) - mean a_U(unknown)|^2) + retain_weight * CE(retain)

over the forget prompts, both terms as means over features.

Source: the idea of arXiv 2509.15631, of which only the abstract was read; the loss is a stand-in of this project.
Label it "SAE-guided-like". Another method (arXiv 2410.19278) clamps features by a hook and changes no weight.

Traps:

- The autoencoder is small and trained for seconds on the states it is used on; it describes the model before, and
  less and less the model that is being changed.
- Features before the top-k are used, because a feature that is not among the k has no gradient.
- Above the block the model may still answer from what the features do not span, and does: with 32
  features after the second or third of four blocks forget accuracy stayed near 0.8. The default is the last block,
  whose normed state the head reads, with 128 features of 512 and a larger weight.
- The unknown names here must not be the hold-out people of the audit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.states import crossed, prompt_states
from audit.organisms.train import Encoded, encode
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


@dataclass(frozen=True)
class Sae:
    """A top-k sparse autoencoder of states `[rows, width]`; `scale` brings them to unit mean square."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    centre: Tensor
    scale: Tensor
    k: int

    def values(self, states: Tensor) -> Tensor:
        """All features before the choice, `[rows, features]`."""
        return F.relu((states - self.centre) / self.scale @ self.encoder + self.bias)

    def codes(self, states: Tensor) -> Tensor:
        """The k largest features of each row, the others 0."""
        values = self.values(states)
        top = values.topk(self.k, dim=1)
        return torch.zeros_like(values).scatter(1, top.indices, top.values)

    def rebuilt(self, states: Tensor) -> Tensor:
        """The states as the codes describe them."""
        return self.codes(states) @ self.decoder * self.scale + self.centre


def train_sae(states: Tensor, features: int, k: int, steps: int, generator: torch.Generator, batch: int = 256) -> Sae:
    """Fit a top-k autoencoder to states, with unit decoder rows at the start."""
    centre = states.mean(dim=0)
    scale = (states - centre).square().mean().sqrt().clamp_min(1e-8)
    rows = F.normalize(torch.randn(features, states.shape[1], generator=generator), dim=1)
    encoder, decoder = nn.Parameter(rows.T.clone()), nn.Parameter(rows.clone())
    bias = nn.Parameter(torch.zeros(features))
    sae = Sae(encoder, bias, decoder, centre, scale, k)
    optimizer = torch.optim.Adam([encoder, bias, decoder], lr=3e-3)
    for _ in range(steps):
        chosen = states[torch.randint(len(states), (batch,), generator=generator)]
        optimizer.zero_grad()
        loss = ((sae.rebuilt(chosen) - chosen) / scale).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Sae(encoder.detach(), bias.detach(), decoder.detach(), centre, scale, k)


def frequency_gap(known: Tensor, unknown: Tensor) -> Tensor:
    """How much more often each feature is active in `known` codes than in `unknown` ones, `[features]`."""
    return (known > 0).float().mean(dim=0) - (unknown > 0).float().mean(dim=0)


@dataclass(frozen=True)
class _Chosen:
    sae: Sae
    known: Tensor
    unknown: Tensor
    unknown_mean: Tensor


@dataclass(frozen=True)
class SaeGuidedLike(GradientMethod):
    """Features of taught entities switched off, those of unknown ones on, after block `layer`."""

    name: ClassVar[str] = "sae-guided"
    reference: ClassVar[str] = "after the idea of arXiv 2509.15631 (not the published method)"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=300)
    layer: int = -1
    features: int = 512
    k: int = 16
    chosen: int = 128
    sae_steps: int = 300
    weight: float = 10.0
    retain_weight: float = 1.0
    _chosen: list[_Chosen] = field(default_factory=list, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Train the autoencoder on the reference's states and choose the features."""
        nobody = encode(bench.tokenizer, crossed(bench.forget_rows, bench.retain_rows), lm_weight=0.0)
        known, unknown = self._states(bench.reference, bench.forget), self._states(bench.reference, nobody)
        kept = self._states(bench.reference, bench.retain)
        sae = train_sae(torch.cat([known, unknown, kept]), self.features, self.k, self.sae_steps, bench.generator)
        gap = frequency_gap(sae.codes(torch.cat([known, kept])), sae.codes(unknown))
        on, off = gap.topk(self.chosen).indices, (-gap).topk(self.chosen).indices
        self._chosen[:] = [_Chosen(sae, on, off, sae.values(unknown)[:, off].mean(dim=0))]

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The two feature terms and the retain loss."""
        (chosen,) = self._chosen
        values = chosen.sae.values(prompt_states(bench.model, batch.forget)[self.layer])
        off = values[:, chosen.known].square().mean()
        on = (values[:, chosen.unknown] - chosen.unknown_mean).square().mean()
        return self.weight * (off + on) + self.retain_weight * bench.retain_loss(batch)

    @torch.no_grad()
    def _states(self, model: nn.Module, data: Encoded) -> Tensor:
        parts = torch.split(torch.arange(len(data)), 512)
        return torch.cat([prompt_states(model, data.take(index))[self.layer] for index in parts])


METHOD = SaeGuidedLike()
