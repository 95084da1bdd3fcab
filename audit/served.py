"""A model that can be asked and not looked into: behind an API, behind a guard, or with two faces."""

from __future__ import annotations

from abc import abstractmethod
from typing import NoReturn, Self

from audit.opened import OpenModel
from audit.target import Target


class Served(Target):
    """A target whose weights are out of reach, and with them whatever alters them."""

    @abstractmethod
    def _refuse_weights(self) -> NoReturn:
        """Raise `NoAccess`, saying of which model and why."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Nothing: which tensors are used shows only once the weights are read."""
        return ()

    def altered(self, name: str, recipe: str) -> Self:  # noqa: ARG002
        """Out of reach: an attack alters weights."""
        self._refuse_weights()

    def adopt(self, other: OpenModel) -> None:  # noqa: ARG002
        """Out of reach."""
        self._refuse_weights()
