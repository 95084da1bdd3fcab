"""Steering an image classifier after one block: what is put in at its class token and patches, and what it answers.

    marks = mark(codes, labels, in_a, most=32, seed=0)    # which features stand for each row's class
    pushes = own_pushes(sae, states, marks, lead, seed)   # by kind, what is added at α = 1
    logits = go_on(target, site, pixels, lambda states: {"more": (states + α * pushes["all"])[:, None]})["more"]

States of an image are [places, width], the class token first where the model has one: `lead` is 1 there, else 0.
Masks and codes are kept for two parts, class token and patches: [rows, 2, features].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from audit.errors import BadInput
from probes.sae_steering import expert_features, matched_features, random_directions
from probes.sae_training import Sae, train_sae

if TYPE_CHECKING:
    import torch

    from audit.image_target import ImageTarget

__all__ = [
    "AMPLIFIED", "KINDS", "Described", "Dictionary", "Marks", "alphas_of", "describe", "go_on", "leading", "learn",
    "mark", "original_pushes", "own_pushes", "read_places", "restore",
]  # fmt: skip

Pictures = Sequence[NDArray[np.uint8]]
Pushes = dict[str, "torch.Tensor"]
Change = Callable[["torch.Tensor"], dict[str, "torch.Tensor"]]

AMPLIFIED = (1.0, 5.0, 10.0)
KINDS = {
    "all": "class token and patches",
    "token": "class token alone",
    "patches": "patches alone",
    "other": "as many other features that fire as often",
    "random": "random directions, as long",
}
"""Where it is put in, and the two controls, in words."""

_READ = 64  # images a pass
_STEERED = 256  # images a pass, each of them as often as it is put in


# --- passes -------------------------------------------------------------------------------------------------


def as_places(state: torch.Tensor) -> torch.Tensor:
    """What a block passes on as [batch, places, width]: maps [batch, channels, height, width] as well."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


def read_places(target: ImageTarget, site: str, pixels: torch.Tensor) -> torch.Tensor:
    """The states of all places at a site, [batch, places, width]."""
    import torch

    from audit.passes import Recording

    with torch.inference_mode(), Recording(target, [site], as_places) as states:
        target.model(pixel_values=pixels)
    return states[site]


def leading(target: ImageTarget, site: str) -> int:
    """1 where the first state is a class token's, which the decision is read from; else 0."""
    states = read_places(target, site, target.pixels([np.zeros((8, 8, 3), np.uint8)]))
    return int(0 < target.parts(site) < states.shape[1])


def go_on(target: ImageTarget, site: str, pixels: torch.Tensor, change: Change) -> dict[str, torch.Tensor]:
    """By name, logits [batch, variants, classes] of a model that goes on from other states than its own.

    `change` makes, of the states [batch, places, width] that the block passes on, those that go on in their stead, by
    name [batch, variants, places, width]. What lies before the block is computed once.
    """
    import torch

    variants: dict[str, int] = {}

    def overwrite(_module: Any, _inputs: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        made = change(as_places(state).float())
        variants.update({name: states.shape[1] for name, states in made.items()})
        changed = torch.cat(list(made.values()), dim=1).flatten(0, 1).to(state.dtype)
        if state.ndim == 4:
            changed = changed.transpose(1, 2).reshape(-1, *state.shape[1:])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = target.site(site)[0].register_forward_hook(overwrite)
    try:
        with torch.inference_mode():
            logits = target.model(pixel_values=pixels).logits.float()
    finally:
        handle.remove()
    pieces = logits.reshape(len(pixels), -1, logits.shape[-1]).split(list(variants.values()), dim=1)
    return dict(zip(variants, pieces, strict=True))


def in_batches(count: int, variants: int = 0) -> Iterator[slice]:
    """Slices of so many images; smaller ones where each goes on as several variants."""
    size = max(1, _STEERED // variants) if variants else _READ
    return (slice(i, i + size) for i in range(0, count, size))


# --- dictionaries -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dictionary:
    """An autoencoder of one model's states at one site, and their means.

    Attributes:
        sae: of class token and patches alike.
        centre: mean state by part, [2, width]; that of the class token is zero where there is none.
    """

    sae: Sae
    centre: torch.Tensor


def learn(
    target: ImageTarget,
    site: str,
    pictures: Pictures,
    *,
    most: int,
    steps: int,
    seed: int,
    tick: Callable[[int, int], None] | None = None,
) -> Dictionary:
    """Train an autoencoder on about `most` states of these images: every class token, and patches drawn at random."""
    import torch

    lead, generator = leading(target, site), torch.Generator().manual_seed(seed)
    tokens, patches = [], []
    for batch in in_batches(len(pictures)):
        states = read_places(target, site, target.pixels(pictures[batch]))
        rest = states[:, lead:]
        each = max(1, min(rest.shape[1], most // len(pictures)))
        drawn = torch.rand(rest.shape[:2], generator=generator).topk(each, dim=1).indices.to(rest.device)
        patches.append(rest.gather(1, drawn[..., None].expand(-1, -1, rest.shape[2])).flatten(0, 1).float())
        tokens.append(states[:, :lead].flatten(0, 1).float())
    pools = torch.cat(tokens), torch.cat(patches)
    width = pools[1].shape[1]
    centre = torch.stack([pool.mean(dim=0) if len(pool) else pool.new_zeros(width) for pool in pools])
    sae = train_sae(
        torch.cat(pools),
        features=4 * width,
        k=16 if width <= 512 else 32,
        steps=steps,
        seed=seed,
        site=site,
        tick=tick,
    )
    return Dictionary(sae, centre)


def codes_by_part(sae: Sae, states: torch.Tensor, lead: int) -> torch.Tensor:
    """Of states [batch, places, width] the class token's codes and the patches' mean codes, [batch, 2, features]."""
    import torch

    codes = sae.encode(states)
    token = codes[:, 0] if lead else torch.zeros_like(codes[:, 0])
    return torch.stack([token, codes[:, lead:].mean(dim=1)], dim=1)


# --- features and pushes ------------------------------------------------------------------------------------


class Marks(NamedTuple):
    """Features that stand for each row's class, by part: [rows, 2, features] bool each.

    Attributes:
        experts: those that fire more in images of the class than, on average over the other classes, in theirs.
        others: as many that are none, and fire in about as many images.
    """

    experts: torch.Tensor
    others: torch.Tensor

    def of(self, rows: slice) -> Marks:
        """Those of some rows."""
        return Marks(self.experts[rows], self.others[rows])


def mark(codes: torch.Tensor, labels: torch.Tensor, in_a: NDArray[np.bool_], most: int, seed: int) -> Marks:
    """Choose at most so many features a class and part, from codes by part [rows, 2, features] of images of classes.

    Experts of a row are chosen on images of its class in the other half than its own; `in_a` [rows] says which half
    that is. At least two classes are needed. The others are drawn by seed.
    """
    import torch

    marks = Marks(torch.zeros_like(codes, dtype=torch.bool), torch.zeros_like(codes, dtype=torch.bool))
    half = torch.from_numpy(in_a).to(labels.device)
    means = {label: codes[labels == label].mean(dim=0) for label in set(labels.tolist())}
    for label, side, part in product(means, (True, False), (0, 1)):
        elsewhere = torch.stack([mean[part] for other, mean in means.items() if other != label])
        here = labels == label
        if not len(chosen_on := codes[here & (half != side), part]):
            continue  # nothing to choose on: nothing is marked
        experts = expert_features(chosen_on, elsewhere, most)
        use = (here & (half == side)).nonzero()
        marks.experts[use, part, experts] = True
        marks.others[use, part, matched_features(codes[:, part], experts, seed)] = True
    return marks


def own_pushes(sae: Sae, states: torch.Tensor, marks: Marks, lead: int, seed: int) -> Pushes:
    """By kind, what the model's own features add to its states, Σ f_j d_j: [batch, places, width] each."""
    codes, places = sae.encode(states), states.shape[1]
    push, other = ((codes * _by_place(chosen, lead, places)) @ sae.W_dec for chosen in marks)
    return _kinds(push, other, lead, seed)


def original_pushes(
    sae: Sae, states: torch.Tensor, original: torch.Tensor, marks: Marks, lead: int, seed: int
) -> Pushes:
    """By kind, what carries the original's activations over at α = 1: [batch, places, width] each.

    At patches the change of the chosen features, Σ (f_j(original) - f_j) d_j; the class token is carried as it is.
    `other` leaves the class token alone; `everything` takes all features of the patches.
    """
    change, places = sae.encode(original) - sae.encode(states), states.shape[1]
    push, other = ((change * _by_place(chosen, lead, places)) @ sae.W_dec for chosen in marks)
    everything = change @ sae.W_dec
    push[:, :lead] = everything[:, :lead] = (original - states)[:, :lead]
    other[:, :lead] = 0
    return {**_kinds(push, other, lead, seed), "everything": everything}


def _kinds(push: torch.Tensor, other: torch.Tensor, lead: int, seed: int) -> Pushes:
    made = {"all": push}
    if lead:
        token, patches = push.clone(), push.clone()
        token[:, lead:], patches[:, :lead] = 0, 0
        made |= {"token": token, "patches": patches}
    noise = random_directions(push.flatten(0, 1), seed).view_as(push)
    return {**made, "other": other, "random": noise}


def _by_place(parts: torch.Tensor, lead: int, places: int) -> torch.Tensor:
    """What is given by part, [batch, 2, ...], by place: [batch, places, ...]."""
    import torch

    rest = parts[:, 1:].expand(-1, places - lead, -1)
    return torch.cat([parts[:, :lead], rest], dim=1)


# --- the whole ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A model, and the dictionary of its states at a site."""

    model: ImageTarget
    dictionary: Dictionary

    def states(self, site: str, pictures: Pictures) -> torch.Tensor:
        """Of these images, [batch, places, width], float32."""
        return read_places(self.model, site, self.model.pixels(pictures)).float()

    def marks(self, site: str, pictures: Pictures, labels: torch.Tensor, in_a: NDArray[np.bool_], seed: int) -> Marks:
        """Its features that stand for these images' classes, an eighth of all at most."""
        import torch

        sae, lead = self.dictionary.sae, leading(self.model, site)
        parts = (self.states(site, pictures[batch]) for batch in in_batches(len(pictures)))
        codes = torch.cat([codes_by_part(sae, states, lead) for states in parts])
        return mark(codes, labels, in_a, sae.cfg.d_sae // 8, seed)


def describe(of: Described, site: str, pictures: Pictures, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well a dictionary describes a model's states of images, and what is lost by its description.

    `error` and `spread` (squared, the latter about the mean state) by part, [batch, 2]; `active` features of a state,
    [batch]; `nll` of the label [batch, 3]: as the model is, from the described states, and from the mean state.
    """
    import torch

    lead = leading(of.model, site)
    kept: dict[str, torch.Tensor] = {}

    def change(states: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = of.dictionary.sae.encode(states)
        rebuilt = of.dictionary.sae.decode(codes)
        mean = _by_place(of.dictionary.centre[None], lead, states.shape[1]).expand_as(states)
        for name, other in (("error", rebuilt), ("spread", mean)):
            squared = (states - other).square().sum(dim=2)
            kept[name] = torch.stack([squared[:, :lead].sum(dim=1), squared[:, lead:].sum(dim=1)], dim=1)
        kept["active"] = (codes > 0).float().sum(dim=2).mean(dim=1)
        return {"nll": torch.stack([states, rebuilt, mean], dim=1)}

    nll = -go_on(of.model, site, of.model.pixels(pictures), change)["nll"].log_softmax(-1)
    return {**kept, "nll": nll.gather(2, labels[:, None, None].expand(-1, 3, 1))[..., 0]}


def alphas_of(kind: str) -> tuple[float, ...]:
    """The αs at which a kind is put in."""
    return {"none": (0.0,), "original everything": (1.0,)}.get(kind, AMPLIFIED)


def restore(
    target: Described,
    original: Described,
    site: str,
    pictures: Pictures,
    labels: torch.Tensor,
    in_a: NDArray[np.bool_],
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Is an image's class the target's answer? By kind of steering, `own all` and so on, [images, alphas] of 0 and 1.

    Args:
        target, original: with dictionaries of this site.
        labels: class of each image, [images]: whose experts are used.
        in_a: which half it belongs to, [images]: experts are chosen on the other.

    `none` is the target's states as they are. Raises BadInput where the original's are of another shape.
    """
    import torch

    lead = leading(target.model, site)
    own, carried = (of.marks(site, pictures, labels, in_a, seed) for of in (target, original))

    def change(states: torch.Tensor, theirs: torch.Tensor, batch: slice) -> dict[str, torch.Tensor]:
        if states.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape[1:])} and {tuple(states.shape[1:])}"
            raise BadInput(f"{site}: states of the original and the {target.model.role} are of shape {shapes}")
        drawn = seed + batch.start
        mine = own_pushes(target.dictionary.sae, states, own.of(batch), lead, drawn)
        others = original_pushes(original.dictionary.sae, states, theirs, carried.of(batch), lead, drawn)
        pushes = {"none": torch.zeros_like(states)}
        pushes |= {f"own {kind}": push for kind, push in mine.items()}
        pushes |= {f"original {kind}": push for kind, push in others.items()}
        return {
            kind: torch.stack([states + alpha * push for alpha in alphas_of(kind)], dim=1)
            for kind, push in pushes.items()
        }

    right: dict[str, list[NDArray[np.float64]]] = {}
    for batch in in_batches(len(pictures), 2 + 2 * len(KINDS) * len(AMPLIFIED)):
        put_in = partial(change, theirs=original.states(site, pictures[batch]), batch=batch)
        for kind, logits in go_on(target.model, site, target.model.pixels(pictures[batch]), put_in).items():
            won = logits.argmax(-1) == labels[batch, None]
            right.setdefault(kind, []).append(won.cpu().numpy().astype(float))
    return {kind: np.concatenate(batches) for kind, batches in right.items()}
