"""A complete image case of known history in about a minute: digits, three models, four sets.

    case = build_image_demo(Path("audit-demo"))

The original is a ViT that was taught all digits but one, the withheld one, which it has an output for; the retrained
one began with the same weights and never saw the forget digit either; the unlearned one is the original after SalUn,
which moves half of the weights, those that matter to the forget digit, towards random other answers. What SalUn leaves
behind has no ground truth: these models show what an audit of images looks like and must not calibrate one.
"""

from __future__ import annotations

import time
from pathlib import Path

from audit.organisms.demo import DemoCase, StageProgress
from audit.organisms.imaging.build import ImageRecipe, build, parts_of
from audit.organisms.recipes import read_history

HISTORIES = {"original": "original", "retrained": "retrained", "unlearned": "salun"}
_MOST = 300
"""Images of a set: with more, intervals hardly shrink, and the audit takes longer."""


def build_image_demo(
    out: Path, *, seed: int = 0, base: str = "vit", short: float = 1.0, progress: StageProgress | None = None
) -> DemoCase:
    """Make the models and the sets under `out`, and return where everything lies.

    `short` teaches for a share of the epochs. The same seed gives the same sets, and on the same machine the same
    weights; models that are there already are kept.
    """
    folders, measured, seconds = {}, {}, {}
    for role, history in HISTORIES.items():
        began = time.perf_counter()
        folders[role] = build(ImageRecipe(base, history, seed, short=short), out / "models", progress)
        seconds[role] = time.perf_counter() - began
        measured[role] = (read_history(folders[role]) or {})["measured"]
    _, parts = parts_of(ImageRecipe(base, "original", seed))
    return DemoCase(out, folders, parts.write_sets(out / "data", _MOST), measured, seconds)
