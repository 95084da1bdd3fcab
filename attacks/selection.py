"""Choosing the images that unlearning would fail on: optimization on two levels, on plain arrays.

    chosen = select(model, images, m, rounds=2, epochs=2, learning_rate=1e-3, seed=0).chosen

See `attacks.worst_case` for the formula, its source, and what differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

    from audit.organisms.imaging.world import Images

__all__ = ["Selection", "project_capped_simplex", "select"]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


def project_capped_simplex(w: ArrayLike, m: float) -> Floats:
    """The nearest point to w, [n], with entries from 0 to 1 that sum to m: clip(w - mu, 0, 1), mu by bisection.

    Raises ValueError if w is no finite vector, or m does not lie between 0 and n.
    """
    v = np.asarray(w, np.float64)
    if v.ndim != 1 or not v.size or not np.isfinite(v).all():
        raise ValueError(f"w must be a finite, non-empty 1-D array, got shape {v.shape}")
    if not 0 <= m <= v.size:
        raise ValueError(f"m must lie between 0 and {v.size}, got {m}")
    low, high = v.min() - 1, v.max()
    for _ in range(100):  # each halves the gap: to the last bit of any float
        mu = (low + high) / 2
        low, high = (mu, high) if np.clip(v - mu, 0, 1).sum() > m else (low, mu)
    return np.asarray(np.clip(v - high, 0, 1))


@dataclass(frozen=True)
class Selection:
    """What would be forgotten worst: `weights` [n], from 0 to 1, and `chosen`, the m largest of them, ascending."""

    weights: Floats
    chosen: Indices


def select(
    model: Any,
    images: Images,
    m: int,
    *,
    seed: int,
    rounds: int = 2,
    epochs: int = 10,
    batch: int = 32,
    learning_rate: float = 1e-3,
    weight_rate: float = 1.0,
    gamma: float = 0.0,
) -> Selection:
    """Choose m images that fine-tuning on the others would forget worst; the model is left as it was.

    Args:
        model: a Hugging Face image classifier in single precision, trained on the images.
        rounds: steps of the upper level, each with n / m runs of the lower level.
        epochs, batch, learning_rate: of sign-SGD at the lower level, which starts from the model each time.
        weight_rate, gamma: eta and gamma of the upper level.

    Weights that are equal are put in an order drawn by `seed`. Raises ValueError if m does not lie between 1 and n - 1,
    RuntimeError where a loss is no longer a number.
    """
    import torch

    n = len(images)
    if not 1 <= m < n:
        raise ValueError(f"m must lie between 1 and {n - 1}, got {m}")
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = np.random.default_rng(seed).random(n)
    weights, loss = np.full(n, m / n), np.empty(n)
    for i in range(rounds):
        likeliest = np.lexsort((drawn, -weights))
        for first in range(0, n, m):
            group = likeliest[first : first + m]
            left = torch.ones(n).to(images.pixels)
            left[group] = 0
            _descend_by_sign(model, images, left, epochs, batch, learning_rate, seed + i)
            loss[group] = _losses(model, images.take(torch.from_numpy(group).to(images.pixels.device)))
            model.load_state_dict(begun)
        if not np.isfinite(loss).all():
            raise RuntimeError(f"round {i} of the choice ended in a loss that is no number")
        weights = project_capped_simplex(weights - weight_rate * (loss + 2 * gamma * weights), m)
    return Selection(weights, np.sort(np.lexsort((drawn, -weights))[:m]))


def _descend_by_sign(
    model: Any, images: Images, left: torch.Tensor, epochs: int, batch: int, learning_rate: float, seed: int
) -> None:
    """Sign-SGD in place on losses weighted by `left` [n]; a batch's sum and mean have the same sign."""
    import torch

    from audit.organisms.imaging.method import logits

    parameters, order = list(model.parameters()), torch.Generator().manual_seed(seed)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            shuffled = torch.randperm(len(images), generator=order).to(left.device)
            for index in shuffled.tensor_split(max(1, -(-len(images) // batch))):
                part = images.take(index)
                loss = torch.nn.functional.cross_entropy(logits(model, part.pixels), part.labels, reduction="none")
                gradients = torch.autograd.grad((left[index] * loss).mean(), parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter.sub_(learning_rate * gradient.sign())
    model.eval()


def _losses(model: Any, images: Images) -> Floats:
    """Cross-entropy of every image in evaluation mode; in double precision, or sure images would all have 0."""
    import torch

    from audit.organisms.imaging.train import all_logits

    losses = torch.nn.functional.cross_entropy(all_logits(model, images).double(), images.labels, reduction="none")
    return np.asarray(losses.cpu().numpy(), np.float64)
