"""Steering by sparse features: which are chosen, what goes into the model in their stead, and what is recorded of it.

    experts = expert_features(codes_of_some, codes_of_others, most=64)
    h + alpha * part(sae, codes, experts)          # alpha -1 removes them, 0 changes nothing, more amplifies

All on states [n, width] and codes [n, features] = `sae.encode(states)`; `probes.sae` says what it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import finite
from audit.controls import grouped_folds
from audit.evidence import Arrays
from audit.plan import Patched, Request, merge
from audit.quantities import TOKEN, Quantity, View, hidden, recorded_by_attack
from audit.tokens import Tokens
from probes.lens import beats
from probes.sae_training import Sae

if TYPE_CHECKING:
    import torch

    from audit.capture import Engine

__all__ = [
    "ALPHAS", "AMPLIFIED", "CARRIED", "CHOICE", "KINDS", "REBUILT", "STEERED", "Floats", "expert_features",
    "matched_features", "part", "put_in_by_kind", "random_directions", "read_states", "rebuild", "restoration_rate",
    "steer",
]  # fmt: skip

Floats = NDArray[np.float64]
Rows = list[tuple[Tokens, dict[str, Arrays]]]
"""What a store keeps: sequences, and by quantity arrays over their scored tokens."""

AMPLIFIED = CARRIED = (1.0, 5.0, 10.0)
ALPHAS = (-1.0, *AMPLIFIED)
KINDS = {
    "expert": "expert features",
    "matched": "as many other features that fire as often",
    "opposite": "expert features of the set that is compared with",
    "random": "random directions, as long",
}
"""What is removed (α = -1) and amplified, in words."""


def _choice(view: View) -> dict[str, torch.Tensor]:
    return {"won": beats(view.logits, view.tokens, list(view.rivals))}


CHOICE = Quantity("fork-choice", _choice)
"""`won` [T]: does the right token beat its rivals; NaN but at a fork."""
STEERED = recorded_by_attack("sae-steered")
"""By kind of steering, who wins at every α, [1, alphas]; `none`: with its own state put in, [1, 1]."""
REBUILT = recorded_by_attack("sae-rebuilt")
"""`error` and `spread` (squared), `active` and `fresh` features [T]; `nll` [T, 3] as it is, rebuilt, and averaged."""


# --- features and directions --------------------------------------------------------------------------------


def expert_features(inside: torch.Tensor, outside: torch.Tensor, most: int) -> torch.Tensor:
    """Features [m <= most] whose mean in codes `inside` [n, features] exceeds that in `outside` [k, features] most.

    The most selective first; none that is not selective.
    """
    if not len(inside) or not len(outside):
        raise ValueError(f"inside holds {len(inside)} codes, outside {len(outside)}: at least one of each is needed")
    selectivity = inside.mean(dim=0) - outside.mean(dim=0)
    order = selectivity.argsort(descending=True, stable=True)[:most]
    return order[selectivity[order] > 0]


def matched_features(codes: torch.Tensor, chosen: torch.Tensor, seed: int) -> torch.Tensor:
    """For each chosen feature another one, not chosen, that fires about as often in `codes` [n, features].

    One of the eight nearest in firing rate that are left, drawn by seed; fewer where they run out.
    """
    import torch

    rates, rng = (codes > 0).float().mean(dim=0).cpu().numpy(), np.random.default_rng(seed)
    left = np.setdiff1d(np.arange(len(rates)), chosen.cpu().numpy())
    drawn = []
    for feature in chosen.tolist()[: len(left)]:
        near = np.argsort(np.abs(rates[left] - rates[feature]), kind="stable")[:8]
        place = int(rng.choice(near))
        drawn.append(int(left[place]))
        left = np.delete(left, place)
    return torch.tensor(drawn, dtype=torch.long, device=chosen.device)


def part(sae: Sae, codes: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """What the chosen features add to the states: Σ f_j d_j, [n, width] from codes [n, features]."""
    added: torch.Tensor = codes[:, chosen] @ sae.W_dec[chosen]
    return added


def random_directions(pushes: torch.Tensor, seed: int) -> torch.Tensor:
    """Random vectors, each as long as its row of `pushes` [n, width]."""
    import torch

    drawn = torch.randn(pushes.shape, generator=torch.Generator().manual_seed(seed)).to(pushes)
    scaled: torch.Tensor = drawn / drawn.norm(dim=1, keepdim=True) * pushes.norm(dim=1, keepdim=True)
    return scaled


def restoration_rate(restored: ArrayLike, target: ArrayLike, reference: ArrayLike) -> Floats:
    """Of what the target lacks, the share that came back: (restored - target) / (reference - target) in [0, 1].

    Accuracies, of any one shape; NaN where the target lacks nothing.
    """
    came, before, wanted = (
        finite(values, name) for values, name in ((restored, "restored"), (target, "target"), (reference, "reference"))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(wanted > before, np.clip((came - before) / (wanted - before), 0, 1), np.nan))


def put_in_by_kind(
    sae: Sae,
    states: Mapping[str, torch.Tensor],
    name: str,
    compared: str,
    clusters: Sequence[str],
    *,
    seed: int,
    original: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """By kind, the states that go in instead of those of the set `name`: [rows, alphas, width] each.

    Args:
        states: at the decisions of every set, [rows, width] each.
        name, compared: expert features fire more in `name` than in `compared`.
        clusters: of the set's rows; features chosen on half of them are used on the rest, and the other way round.
        original: the original's states of the same rows; without them no kind is `carried`, nor `all carried`.

    `none` is the states as they are.
    """
    import torch

    here, codes = states[name], {of: sae.encode(found) for of, found in states.items()}
    theirs = codes[name] if original is None else sae.encode(original)
    everywhere, most = torch.cat(list(codes.values())), sae.cfg.d_sae // 8
    pushes = {kind: torch.zeros_like(here) for kind in (*KINDS, "carried")}
    for choose, use in grouped_folds(list(clusters), np.zeros(len(here)), 2, seed=seed):
        inside, mine = codes[name][choose], codes[name][use]
        experts = expert_features(inside, codes[compared], most)
        pushes["expert"][use] = part(sae, mine, experts)
        pushes["matched"][use] = part(sae, mine, matched_features(everywhere, experts, seed))
        pushes["opposite"][use] = part(sae, mine, expert_features(codes[compared], inside, most))
        pushes["carried"][use] = part(sae, theirs[use] - mine, experts)
    pushes["random"] = random_directions(pushes["expert"], seed)
    made = {kind: torch.stack([here + alpha * pushes[kind] for alpha in ALPHAS], dim=1) for kind in KINDS}
    if original is not None:
        made["carried"] = torch.stack([here + alpha * pushes["carried"] for alpha in CARRIED], dim=1)
        made["all carried"] = (here + (theirs - codes[name]) @ sae.W_dec)[:, None]
    return {"none": here[:, None], **made}


# --- passes -------------------------------------------------------------------------------------------------


def read_states(engine: Engine, site: str, texts: Sequence[Tokens]) -> list[torch.Tensor]:
    """The states at the positions that predict each text's scored tokens, [scored, width] each, on the CPU."""
    import torch

    quantity = hidden(site)
    found: dict[str, NDArray[np.float32]] = {}
    for batch in engine.batches(merge([Request("sae/states", tuple(texts), (quantity,))])):
        found |= {row.tokens.key: row.values[quantity.name]["hidden"][:, 0] for row in engine.run(batch)}
    return [torch.from_numpy(found[text.key][-text.scored :]) for text in texts]


def steer(engine: Engine, site: str, forks: Sequence[Tokens], put_in: Mapping[str, torch.Tensor]) -> Rows:
    """Who wins at every fork with each of the states put in, `[rows, alphas, width]` by kind: rows of `STEERED`."""
    import torch

    from audit.patching import patched

    every = torch.cat(list(put_in.values()), dim=1).cpu().numpy()
    ends = np.cumsum([states.shape[1] for states in put_in.values()])[:-1]
    request = Patched("sae", tuple(forks), engine.target.role, (site,) * every.shape[1], (CHOICE,))
    return [
        (
            row.tokens,
            {STEERED.name: dict(zip(put_in, np.split(row.values[CHOICE.name]["won"][:, 1:], ends, 1), strict=True))},
        )
        for chunk in _chunks(engine, forks)
        for row in patched(engine, forks[chunk], request, every[chunk])
    ]


def rebuild(engine: Engine, site: str, sae: Sae, texts: Sequence[Tokens], centre: torch.Tensor) -> Rows:
    """How the autoencoder describes texts, and what is lost by its description: rows of `REBUILT`.

    `centre` [width] goes in instead as well: how much there is to lose.
    """
    import torch

    from audit.patching import patched

    request = Patched("sae", tuple(texts), engine.target.role, (site, site), (TOKEN,))
    seen = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    rows: Rows = []
    for chunk in _chunks(engine, texts):
        states = torch.cat(read_states(engine, site, texts[chunk])).to(centre)
        codes = sae.encode(states)
        described, fired = sae.decode(codes), (codes > 0).cpu()
        new = fired.any(dim=0) & ~seen
        values = {
            "error": (states - described).square().sum(dim=1),
            "spread": (states - centre).square().sum(dim=1),
            "active": fired.sum(dim=1).float(),
            "fresh": torch.bincount(fired.int().argmax(dim=0)[new], minlength=len(states)).float(),
        }
        seen |= new
        put_in = torch.stack([described, centre.expand_as(described)], dim=1).cpu().numpy()
        found = patched(engine, texts[chunk], request, put_in)
        ends = np.cumsum([row.tokens.scored for row in found])[:-1]
        parts = {key: np.split(value.cpu().numpy(), ends) for key, value in values.items()}
        for i, row in enumerate(found):
            nll = -row.values[TOKEN.name]["logprob"]
            rows.append((row.tokens, {REBUILT.name: {key: pieces[i] for key, pieces in parts.items()} | {"nll": nll}}))
    return rows


def _chunks(engine: Engine, texts: Sequence[Tokens]) -> list[slice]:
    """Slices of the texts that fit a batch each."""
    size = max(1, engine.token_budget // max(len(tokens.ids) for tokens in texts))
    return [slice(i, i + size) for i in range(0, len(texts), size)]
