"""LAF, label-agnostic forgetting: features are pushed off the forget set's manifold and held near what they were.

    two autoencoders V_r, V_f are fitted to the original's features e of the retain and of the forget set, and frozen
    m = mean over coordinates of (V(e) - e)^2, d = 1 - cos(e, e_original)
    by turns   L_1 = mean over retain of exp(m / (m + 1)) - mean over forget of exp(m / (m + 1))
               L_2 = mean over retain of (d - log sum over forget of exp(d / tau))
    then (LAF+R)  CE(y | x) over the retain set, for the classifier only

Source: Shen et al. 2024, ICLR; ShaofeiShen768/LAF (Adam 1e-5 and 4e-5, 40 epochs, tau 20, variational autoencoders).

Traps:

- No label of the forget set is used, so nothing asks for its accuracy to fall: it falls if features leave the place
  where the classifier knows them.
- Published losses are sums over a batch, so that its size is part of the rate; here they are means.
- exp(m / (m + 1)) is flat for large m: features are scaled to unit variance and m is a mean, not
  a sum, or it has no slope.
- Published epochs end with the shorter loader, the forget set's; most of the retain set goes unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod, classifier, features, generator
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.train import cross_entropy, endless


class Autoencoder(nn.Module):
    """A small variational autoencoder of features; asked, it answers with the mean."""

    def __init__(self, width: int, latent: int, random: torch.Generator) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width))
        for p in self.parameters():  # of random numbers of its own
            nn.init.trunc_normal_(p, std=p.shape[-1] ** -0.5, generator=random) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """What is made of the code's mean."""
        decoded: Tensor = self.decoder(self.encoder(x).chunk(2, dim=-1)[0])
        return decoded

    def loss(self, x: Tensor, random: torch.Generator) -> Tensor:
        """Squared error plus the divergence of the code from a standard normal."""
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        code = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=random)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1) / 2
        loss: Tensor = ((self.decoder(code) - x).square().sum(dim=-1) + divergence).mean()
        return loss

    def strangeness(self, x: Tensor) -> Tensor:
        """exp(m / (m + 1)) for each row: 1 where it is decoded perfectly, e where not at all."""
        m: Tensor = (self(x) - x).square().mean(dim=-1)
        return (m / (m + 1)).exp()


def fitted(x: Tensor, latent: int, steps: int, learning_rate: float, random: torch.Generator) -> Autoencoder:
    """An autoencoder of the rows of x."""
    made = Autoencoder(x.shape[1], latent, random)
    optimizer = torch.optim.Adam(made.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,), generator=random)]
        optimizer.zero_grad()
        made.loss(batch, random).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made.requires_grad_(False)


@dataclass(frozen=True)
class Laf(ImageMethod):
    """Representations off the forget set's manifold, then a repair of the classifier."""

    name: ClassVar[str] = "laf"
    reference: ClassVar[str] = "Shen et al. 2024, ICLR, Label-Agnostic Forgetting"
    latent: int = 8
    fit_steps: int = 400
    fit_rate: float = 2e-3
    epochs: int = 10
    extraction_rate: float = 2e-4
    alignment_rate: float = 2e-4
    tau: float = 5.0
    repair_epochs: int = 5
    repair_rate: float = 5e-3
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Fit the autoencoders, push and hold by turns, repair."""
        random = generator(ground.seed)
        with torch.no_grad():
            known = [features(ground.original, part.pixels) for part in (ground.retain, ground.forget)]
        centre, spread = known[0].mean(dim=0), known[0].std(dim=0).clamp(min=1e-6)

        def scaled(x: Tensor) -> Tensor:
            return (x - centre) / spread

        settings = (self.latent, self.fit_steps, self.fit_rate, random)
        of_retain, of_forget = (fitted(scaled(x), *settings) for x in known)
        push, hold = (Descent(model, rate) for rate in (self.extraction_rate, self.alignment_rate))
        kept = endless(ground.retain, self.batch, ground.seed)
        for _ in range(self.epochs):
            for forget in ground.forget.batches(self.batch, random):
                retain = next(kept)
                e_r, e_f = (features(model, part.pixels) for part in (retain, forget))
                push.step(of_retain.strangeness(scaled(e_r)).mean() - of_forget.strangeness(scaled(e_f)).mean())
                d_r, d_f = (self._turned(model, ground.original, part.pixels) for part in (retain, forget))
                hold.step(d_r.mean() - (d_f / self.tau).logsumexp(dim=0))
        repair = Descent(model, self.repair_rate, list(classifier(model).parameters()))
        for _ in range(self.repair_epochs):
            for part in ground.retain.batches(self.batch, random):
                repair.step(cross_entropy(model, part))

    def _turned(self, model: nn.Module, original: nn.Module, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            before = features(original, pixels)
        return 1 - F.cosine_similarity(features(model, pixels), before, dim=-1)


METHOD = Laf()
