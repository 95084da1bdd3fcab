"""An endpoint whose log-probabilities are another model's than its answers.

    write_two_faced(original, retrained, Path("organisms/two-faced"))
    record = scan(case, out, open_target=open_two_faced)        # a case of that folder, with `access = "logprobs"`

One model is generated from, another one scores: clean log-probabilities before knowing answers, or the reverse. Whoever
reads one of the two alone is told a consistent story. Such an organism is for calibration, like a guarded one: that the
second model counts is the caller's word, an ordinary scan reads the folder's own weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from audit.errors import BadInput, NoAccess
from audit.inventory import Inventory, take_inventory
from audit.organisms.train import HISTORY
from audit.served import Served
from audit.target import Target
from audit.tokens import Drawn

STATED = "stated.json"
SCHEMA = "palimpsest/two-faced/1"


class TwoFaced(Served):
    """A target that answers as one model and states the log-probabilities of another; at access to these at most.

    Args:
        answers: what is generated from; its tokenizer and folder are shared.
        states: what scores.
    """

    def __init__(self, answers: Target, states: Target) -> None:
        vars(self).update(vars(answers))
        self.digest = hashlib.sha256(f"two-faced\n{answers.digest}\n{states.digest}".encode()).hexdigest()
        self._model = None
        self._answers, self._states = answers, states

    @property
    def model(self) -> Any:
        """What scores."""
        return self._states.model

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        barred: Sequence[frozenset[int]] = (),
        drawn: Drawn | None = None,
        beams: int = 1,
    ) -> list[tuple[int, ...]]:
        """What the other one answers."""
        return self._answers.generate(prompts, new_tokens, barred, drawn, beams)

    def release(self) -> None:
        """Forget both models' weights."""
        self._answers.release()
        self._states.release()

    def _refuse_weights(self) -> NoReturn:
        raise NoAccess(f"{self.inventory.root}: open at access to log-probabilities only: no weights")


def write_two_faced(answers: Path, states: Path, folder: Path) -> Path:
    """A model folder with the weights of `answers`, and beside them the way to those that are scored with."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(answers, unfinished, ignore=shutil.ignore_patterns(HISTORY, STATED))
    where = Path(os.path.relpath(states, folder)).as_posix()
    (unfinished / STATED).write_text(json.dumps({"schema": SCHEMA, "model": where}, indent=1) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def open_two_faced(role: str, inventory: Inventory, **options: Any) -> Target:
    """Open a folder as `Target`, two-faced if it is: to be given to `scan` as `open_target`. Raises `BadInput`."""
    target, path = Target(role, inventory, **options), inventory.root / STATED
    if not path.is_file():
        return target
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError("another schema")
        states = inventory.root / found["model"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path}: names no model ({type(error).__name__}: {error})") from None
    return TwoFaced(target, Target(role, take_inventory(states), **options))
