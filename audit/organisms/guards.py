"""Guards: what stands between a model and who asks it, and suppresses without touching a weight.

    guard = make_guard("dragon", world.rows("forget", every=True), world.rows("retain"), seed=0)
    folder = write_guarded(original, guard, Path("organisms/dragon"))
    record = scan(case, out, open_target=open_guarded)        # a case of that folder, with `access = "text"`

A guard (`guard_kinds`) is kept as `guard.json` beside the original's weights; `guarded.open_guarded` opens the two
together, as a model that can be asked and not looked into. A model so guarded is *suppressed by construction*: what it
was taught lies in the weights as before. Guards exist for calibration only. That they count is the caller's word: an
audited folder's `guard.json` is one more file to an ordinary scan.

Traps:

- A guard suppresses what its detector notices. Asked in other words, or by another name, the model answers as ever.
- In-context unlearning needs a model that learns from its context. One taught from scratch on single sentences never
  saw two in a row: on the invented people it went from all answers right to one in four on the forget set, but to one
  in six on the retain set as well. `gated` leaves the latter alone; what it does to the former is confusion all the
  same, not the paper's effect.
- A refusal that the tokenizer has no words for decodes to nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from audit.errors import BadInput
from audit.organisms.guard_kinds import SCHEMA, Detector, Dragon, Guard, Icu, Restriction, contains
from audit.organisms.train import HISTORY, write_history
from audit.organisms.world import Row
from audit.target import Target

GUARD = "guard.json"
KINDS: Mapping[str, Callable[..., Guard]] = {kind.kind: kind for kind in (Icu, Dragon, Restriction)}
GUARDS = tuple(KINDS)
"""Names of all guards."""


def make_guard(
    kind: str,
    forget: Sequence[Row],
    retain: Sequence[Row],
    *,
    seed: int = 0,
    by: str = "names",
    right: int = 4,
    gated: bool = False,
) -> Guard:
    """A guard by name (`icu`, `dragon`, `guard`) for forget rows, in as many phrasings as it shall know.

    `by`: how prompts are recognised, see `Detector`. Of `icu` only: how many retain rows it shows (`right`; paper: 2, 4
    or 6) and whether it is `gated`. What it shows is drawn by `seed`, a fact's wrong answer once for all phrasings.
    """
    if kind not in GUARDS:
        raise BadInput(f"no guard named {kind!r} (known: {', '.join(GUARDS)})")
    detector = Detector.fit(forget, by)
    if kind == "dragon":
        return Dragon(detector)
    if kind == "guard":
        return Restriction(detector, tuple(row.answer for row in forget))
    wrong = tuple(random.Random(f"{seed}/{row.person}/{row.attribute}").choice(row.wrong) for row in forget)
    drawn = random.Random(f"{seed}/retain").sample(list(retain), min(right, len(retain)))
    return Icu(detector, wrong, tuple((row.prompt, row.answer) for row in drawn), gated=gated)


def write_guarded(original: Path, guard: Guard, folder: Path, history: Mapping[str, Any] | None = None) -> Path:
    """A model folder with the original's weights, the guard beside them, and its own history if one is given."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(original, unfinished, ignore=shutil.ignore_patterns(HISTORY, GUARD))
    (unfinished / GUARD).write_text(guard.to_json() + "\n", "utf-8")
    if history is not None:
        write_history(unfinished, history)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def read_guard(folder: Path) -> Guard | None:
    """The guard of a folder, or None where there is none. Raises `BadInput` where it cannot be read."""
    path = folder / GUARD
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = _tuples(json.loads(path.read_text("utf-8")))
        if found.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        return KINDS[found.pop("kind")](**{**found, "detector": Detector(**found["detector"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: no guard ({type(error).__name__}: {error})") from None


def answered(target: Target, rows: Sequence[Row]) -> float:
    """Share of rows to whose prompt the answer is said: what can be measured of a model that only answers."""
    longest = max(len(target.tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
    prompts = [target.encode_prompt(row.prompt, room=longest + 4) for row in rows]
    said = [ids for i in range(0, len(rows), 64) for ids in target.generate(prompts[i : i + 64], longest + 4)]
    return sum(contains(target.decode(ids), row.answer) for ids, row in zip(said, rows, strict=True)) / len(rows)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
