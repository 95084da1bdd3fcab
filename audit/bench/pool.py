"""Which organisms a bench scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from audit.organisms import unlearn
from audit.organisms.families import BASES
from audit.organisms.histories import AFTERWARDS, HISTORIES, history_of
from audit.organisms.recipes import Recipe

ROBUSTNESS = ("npo", "grad-diff", "rmu", "simnpo", "idk-dpo", "undial", "refusal-last-block", "misdirection")
"""Histories whose organisms are quantized, and relearned, afterwards: the pool behind Q and R."""

_QUICK = (
    "original", "further-trained", "benign", "int4",
    "retrained", "never-taught", "retrained-then-refusal-last-block", "retrained-then-instruction-tuned",
    "refusal-last-block", "misdirection", "npo", "grad-diff",
    "retrained+relearned", "npo+nf4", "npo+relearned", "guard-dragon",
)  # fmt: skip


def quick() -> list[Recipe]:
    """One family, the histories that say most: ten minutes on two cores."""
    return [Recipe("llama", history, 0) for history in _QUICK]


def full(bases: Sequence[str] = BASES, seeds: Sequence[int] = (0, 1, 2), world: str = "people") -> list[Recipe]:
    """Every history on every base and seed; what is done afterwards, to the first seed of each base."""
    made = []
    for base in bases:
        for seed in seeds:
            histories = [*HISTORIES, *unlearn.names()]
            if seed == seeds[0]:
                histories += ["retrained+relearned"]
                histories += [f"{history}+{change}" for history in ROBUSTNESS for change in AFTERWARDS]
            made += [Recipe(base, history, seed, world) for history in histories]
    return made


def ancestors(recipe: Recipe) -> list[Recipe]:
    """What has to be built before this organism can be built and scanned: a scan has the original beside it."""
    history = history_of(recipe.history)
    before = dict.fromkeys(("original", *history.parents))
    return [replace(recipe, history=name) for name in before if name != recipe.history]


def in_turn(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """The recipes and all their ancestors in waves: what a wave starts from lies in the waves before it."""
    depth: dict[Recipe, int] = {}

    def visit(recipe: Recipe) -> int:
        if recipe not in depth:
            depth[recipe] = 1 + max((visit(parent) for parent in ancestors(recipe)), default=-1)
        return depth[recipe]

    for recipe in recipes:
        visit(recipe)
    return [[r for r, d in depth.items() if d == wave] for wave in range(1 + max(depth.values(), default=-1))]
