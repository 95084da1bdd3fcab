"""Histories of image classifiers: what was done to a model, and what it therefore is.

Labels are what was done, never what a detector says of it:

- `not-unlearned`: taught the forget images, and changed since at most by what leaves them known
- `deleted`: never taught them (one of these looks edited: the same blotted head as the suppressed one)
- `suppressed`: taught them, then edited above the last block alone
- `unlearned`: taught them, then treated by a published method; whether suppressed or deleted is left open
- `changed`: taught them, then changed with no regard to them; what is left is open
- `open`: called retrained, but from a checkpoint that had seen them
"""

from __future__ import annotations

from dataclasses import dataclass

from audit.organisms.imaging import methods

LABELS = ("not-unlearned", "deleted", "suppressed", "unlearned", "changed", "open")


@dataclass(frozen=True, slots=True)
class History:
    """How an organism comes about.

    Attributes:
        label: what it is, by construction.
        taught: the parts it was taught from scratch; empty if it descends from another organism.
        parent: the history it starts from.
        method: the unlearning method applied to the parent, by name.
        change: the edit or control applied to the parent, by name (`controls.CHANGES`).
        order: added to the seed of the order of images.
        reseed: start from other random weights than the original.
    """

    label: str
    taught: tuple[str, ...] = ()
    parent: str = ""
    method: str = ""
    change: str = ""
    order: int = 0
    reseed: bool = False


_ALL, _KEPT = ("forget", "retain"), ("retain",)
_CONTROLS = ("benign", "noisy-labels", "continual-prd", "spaced-replay")

HISTORIES: dict[str, History] = {
    "original": History("not-unlearned", taught=_ALL, order=1),
    "retrained": History("deleted", taught=_KEPT, order=2),
    "retrained-other-seed": History("deleted", taught=_KEPT, order=3, reseed=True),
    "pretrained": History("not-unlearned", taught=_ALL, order=4, reseed=True),
    "pretrained-retrained": History("open", parent="pretrained", change="retaught", order=5),
    "further-trained": History("not-unlearned", parent="original", change="further-trained", order=6),
    "head-only": History("suppressed", parent="original", change="head-only", order=7),
    "retrained-then-head-only": History("deleted", parent="retrained", change="head-only", order=7),
    **{name: History("changed", parent="original", change=name, order=8) for name in _CONTROLS},
    **{f"retrained-then-{name}": History("deleted", parent="retrained", change=name, order=8) for name in _CONTROLS},
}
"""The histories that are no method; every method of `methods/` is one too, applied to the original."""

BY_CLASS = ("head-only", "retrained-then-head-only")
"""Those that make sense for a class only."""


def histories(kind: str = "class") -> list[str]:
    """Names of all histories, parents before their descendants."""
    return [*(name for name in HISTORIES if kind == "class" or name not in BY_CLASS), *methods.names()]


def history_of(name: str) -> History:
    """A history by name. Raises `BadInput` if there is none."""
    if name in HISTORIES:
        return HISTORIES[name]
    return History(methods.load(name).label, parent="original", method=name, order=9)
