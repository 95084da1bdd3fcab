"""What several methods share: steps down a loss with everything else left as it was, and when to stop going up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod
from audit.organisms.imaging.train import accuracy, endless
from audit.organisms.imaging.world import Images
from audit.organisms.train import finite


class Descent:
    """Adam on some parameters of a model in evaluation mode.

    What batch normalization has counted stays, so a model whose weights may not move in some place does not change
    there at all. No weight decay: it would move weights that no gradient asks to move.

    Args:
        parameters: what is stepped; all of the model if None.
        masks: one for each parameter; where False a weight stays exactly as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        parameters: Sequence[nn.Parameter] | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        model.eval()
        self.parameters = list(model.parameters()) if parameters is None else list(parameters)
        self._optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self._masks = masks
        self._steps = 0

    def step(self, loss: Tensor) -> None:
        """One step down. Raises `Diverged` where the loss is no longer a number."""
        finite(loss, self._steps)
        self._steps += 1
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for i, (parameter, gradient) in enumerate(zip(self.parameters, found, strict=True)):
            # With a gradient of 0 from the first step on, Adam's momentum is 0 and so is its step.
            parameter.grad = gradient if gradient is None or self._masks is None else gradient * self._masks[i]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class UntilQuiet(ImageMethod):
    """A method that nothing holds: it ends once the forget set is quiet, after `steps` batches at the latest.

    Attributes:
        goal: accuracy on the images of a class to be forgotten, to be at most this.
        instance_goal: the same for single images of all classes; a model that never saw them knows most of them.
    """

    goal: float = 0.02
    instance_goal: float = 0.9
    steps: int = 200
    batch: int = 64

    def batches(self, model: nn.Module, ground: Ground) -> Iterator[Images]:
        """Batches of the forget set for as long as it is not quiet."""
        goal = self.instance_goal if ground.forgotten is None else self.goal
        for part in islice(endless(ground.forget, self.batch, ground.seed), self.steps):
            if accuracy(model, ground.forget) <= goal:
                return
            yield part
