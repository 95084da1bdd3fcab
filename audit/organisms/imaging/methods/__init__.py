"""Unlearning methods for image classifiers, one file each. Each module holds `METHOD`.

from audit.organisms.imaging import methods

methods.names()
methods.load("salun").unlearn(model, ground)
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from audit.errors import BadInput

if TYPE_CHECKING:
    from audit.organisms.imaging.method import ImageMethod


def names() -> list[str]:
    """Names of all methods, sorted; imports none of them."""
    return sorted(
        module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )


def load(name: str) -> ImageMethod:
    """One method by name. Raises `BadInput` if there is none."""
    if name not in names():
        raise BadInput(f"no unlearning method for images named {name!r} (known: {', '.join(names())})")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    method: ImageMethod = module.METHOD
    return method


def methods() -> dict[str, ImageMethod]:
    """All of them by name."""
    return {name: load(name) for name in names()}
