"""What one forward pass can record at the scored tokens.

A quantity is computed from a `View` of the pass while the logits are in memory, reduced to a few numbers a
token, and kept. An instrument adds a quantity of its own by giving `Quantity` a name and a function; the name
is part of the evidence's address, so a changed function needs a changed name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class View:
    """N scored tokens in the middle of a pass.

    Attributes:
        tokens: ids of the scored tokens, shape [N].
        hidden: by site, the states at the positions that predict them, shape [N, width].
        rivals: competing ids of each scored token, N tuples (empty but at a fork).
    """

    def __init__(
        self,
        final: torch.Tensor,
        tokens: torch.Tensor,
        hidden: Mapping[str, torch.Tensor],
        rivals: Sequence[tuple[int, ...]],
        head: Callable[[torch.Tensor], torch.Tensor],
        norm: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._final = final
        self.tokens = tokens
        self.hidden = hidden
        self.rivals = rivals
        self._head = head
        self._norm = norm

    @cached_property
    def logits(self) -> torch.Tensor:
        """Next-token logits, shape [N, vocabulary], float32."""
        return self._head(self._final)

    @cached_property
    def logprobs(self) -> torch.Tensor:
        """Next-token log-probabilities in nats, shape [N, vocabulary]."""
        return self.logits.log_softmax(-1)

    def lens(self, site: str) -> torch.Tensor:
        """Logits read from a site through the final norm and the unembedding, shape [N, vocabulary]."""
        return self._head(self._norm(self.hidden[site]))


@dataclass(frozen=True)
class Quantity:
    """Something to record at every scored token.

    Attributes:
        name: address of the quantity in the evidence store.
        compute: from a view of N tokens to named tensors of shape [N, ...].
        sites: canonical hook names whose states `compute` reads.
    """

    name: str
    compute: Callable[[View], dict[str, torch.Tensor]]
    sites: tuple[str, ...] = ()


def _token(view: View) -> dict[str, torch.Tensor]:
    logprobs = view.logprobs
    return {
        "logprob": logprobs.gather(1, view.tokens[:, None])[:, 0],
        "match": logprobs.argmax(1) == view.tokens,
    }


def _moments(view: View) -> dict[str, torch.Tensor]:
    import torch

    logprobs = view.logprobs
    if torch.isneginf(logprobs).any():  # a masked vocabulary entry: p log p -> 0, not NaN
        logprobs = logprobs.clamp_min(-1e4)
    probabilities = logprobs.exp()
    mean = torch.linalg.vecdot(probabilities, logprobs)
    # Not E[x^2] - E[x]^2, which cancels: a quarter is wrong where 32,000 entries are nearly equally likely.
    variance = torch.linalg.vecdot(probabilities, (logprobs - mean[:, None]).square_())
    return {"mean": mean, "variance": variance}


TOKEN = Quantity("token", _token)
"""`logprob` (nats) and `match` (is it the argmax?) of each scored token, shape [T] each."""

MOMENTS = Quantity("moments", _moments)
"""`mean` and `variance` of log p over the vocabulary, shape [T] each; the entropy in nats is `-mean`."""


def top_k(k: int) -> Quantity:
    """`top_ids` and `top_logprobs` of the k likeliest next tokens, shape [T, k] each."""

    def compute(view: View) -> dict[str, torch.Tensor]:
        values, ids = view.logprobs.topk(k, dim=-1)
        return {"top_ids": ids, "top_logprobs": values}

    return Quantity(f"top-{k}", compute)


def hidden(*sites: str) -> Quantity:
    """The states themselves, `hidden` of shape [T, sites, width], at the positions that predict the scored tokens."""

    def compute(view: View) -> dict[str, torch.Tensor]:
        import torch

        return {"hidden": torch.stack([view.hidden[site] for site in sites], dim=1)}

    return Quantity(f"hidden:{','.join(sites)}", compute, sites)


def recorded_by_attack(name: str) -> Quantity:
    """A quantity that no pass records: an attack takes it itself, and hands it over in `Stage.rows`."""
    return Quantity(name, _not_in_a_pass)


def _not_in_a_pass(_: View) -> dict[str, torch.Tensor]:
    raise RuntimeError("this is recorded by an attack itself, not by a pass")
