"""An opened model of any kind: its folder, its weights, and the views of it that an attack has altered.

A folder is opened only after its inventory was taken (`audit.inventory`), with remote code and the network
ruled out explicitly. The weights are read when a pass, or an instrument, first needs them. What is particular to
language models is in `audit.target`, to image classifiers in `audit.image_target`.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from audit.errors import BadInput, Refused
from audit.inventory import Inventory, take_inventory

if TYPE_CHECKING:
    from audit.loaders import Example
    from audit.passes import Pass
    from audit.tokens import Tokens


class OpenModel(ABC):
    """A model under audit, or one it is compared with.

    Args:
        role: `target`, `original` or `retrained`; an attacked model is `target+relearn@20`.
        inventory: what `take_inventory` found in the folder.
        device: a torch device.
        dtype: of the weights in memory.
        template: how a prompt becomes text, where there are prompts.
    """

    factory: ClassVar[Any]
    """The auto class of transformers that reads such models."""

    def __init__(
        self, role: str, inventory: Inventory, *, device: str, dtype: torch.dtype, template: str = "auto"
    ) -> None:
        self.role = role
        self.inventory = inventory
        self.digest = inventory.digest
        self.device = torch.device(device)
        self.dtype = dtype
        self.template = template
        self._unused: tuple[str, ...] | None = None
        self._model: Any = None

    @abstractmethod
    def passes(self, share: bool) -> Pass:
        """How inputs go through this model; `share`: compute common beginnings once, where it can."""

    @abstractmethod
    def site(self, name: str) -> tuple[torch.nn.Module, str]:
        """The module behind a place's name, and whether its `input` or `output` is meant.

        Raises:
            BadInput: no such place in this architecture.
        """

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of blocks."""

    @property
    @abstractmethod
    def blocks(self) -> list[str]:
        """Module paths of the blocks, from the input to the output."""

    @property
    @abstractmethod
    def output_head(self) -> torch.nn.Module:
        """The unembedding, or the classifier."""

    @abstractmethod
    def question(self, example: Example) -> Tokens:
        """An example before the model, its answer scored."""

    @abstractmethod
    def loss(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Mean negative log-likelihood of what is scored in a batch, in nats, with a gradient: to fine-tune by."""

    def matrices(self) -> list[tuple[torch.Tensor, bool]]:
        """See `matrices`."""
        return matrices(self.model, self.output_head)

    def decode(self, ids: tuple[int, ...]) -> str:  # noqa: ARG002
        """Text of token ids. Raises BadInput where the model writes none."""
        raise BadInput(f"{self.inventory.root}: {self.inventory.architecture} writes no text")

    @property
    def cut(self) -> int:
        """How many inputs were too long for the model, and were cut."""
        return 0

    def _load(self, factory: Any, **options: Any) -> Any:
        root: Path = self.inventory.root
        if self.inventory.format == "gguf":
            options["gguf_file"] = self.inventory.weight_files[0]
            if len(self.inventory.files) == 1:
                root = self._alone(root / self.inventory.weight_files[0])
        try:
            return factory.from_pretrained(root, trust_remote_code=False, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
            raise Refused(f"{self.inventory.root}: cannot be opened: {str(error).splitlines()[0]}") from None

    def _alone(self, file: Path) -> Path:
        """A folder that holds this file only: its neighbours were not inventoried, and the loader would read them."""
        if not hasattr(self, "_folder"):
            self._folder = TemporaryDirectory(prefix="palimpsest-")
            (Path(self._folder.name) / file.name).symlink_to(file)
        return Path(self._folder.name)

    @property
    def _config(self) -> Any:
        from transformers import AutoConfig

        if not hasattr(self, "_config_cache"):
            with quiet():
                self._config_cache = self._load(AutoConfig)
        return self._config_cache

    @property
    def model(self) -> Any:
        """The Hugging Face model, in evaluation mode; loaded on first use."""
        if self._model is None:
            with quiet():
                model, found = self._load(self.factory, dtype=self.dtype, output_loading_info=True)
            if missing := sorted(found["missing_keys"]):  # transformers would fill these with random numbers
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise Refused(f"{self.inventory.root}: no tensor {missing[0]}{more} in the weights")
            self._unused = tuple(sorted(found["unexpected_keys"]))
            # What the folder says of generation must not decide what an audit gets to read.
            if (kept := getattr(model, "generation_config", None)) is not None:
                model.generation_config = GenerationConfig(
                    bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id
                )
            self._model = model.to(self.device).eval().requires_grad_(False)
        return self._model

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of the folder that the architecture does not use; reads the weights if nothing has yet."""
        if self._unused is None:
            _ = self.model
        return self._unused or ()

    def release(self) -> None:
        """Forget the weights: the next use reads them from disk again, unaltered."""
        if self._model is not None:
            weights = weakref.ref(self._model)
            self._model = None
            if weights() is not None:  # held by a cycle; looking for it takes long, so not otherwise
                gc.collect()

    def beside(self, role: str, folder: Path) -> Self:
        """Another model folder, opened in the same way."""
        return type(self)(
            role, take_inventory(folder), device=str(self.device), dtype=self.dtype, template=self.template
        )

    def altered(self, name: str, recipe: str) -> Self:
        """This target after an attack: same folder, other role and digest, sharing the weights in memory."""
        other = copy.copy(self)
        other.role = f"{self.role}+{name}"
        other.digest = hashlib.sha256(f"{self.digest}\n{recipe}".encode()).hexdigest()
        return other

    def adopt(self, other: OpenModel) -> None:
        """Take over another view's weights in memory: those an attack has altered by now."""
        self._model = other._model

    def let_go(self) -> None:
        """Forget weights that were taken over; the view they came from keeps them."""
        self._model = None


def matrices(model: torch.nn.Module, head: torch.nn.Module | None = None) -> list[tuple[torch.Tensor, bool]]:
    """Weights of all linear maps and convolutions of a model; not embeddings, and not those of its output `head`.

    Without `head`, a Hugging Face model is asked for its own. With each weight: is it stored [in, out], as GPT-2 does,
    rather than [out, in, …]?
    """
    own: Callable[[], torch.nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = own() if head is None else head
    spared = {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    found: dict[int, tuple[torch.Tensor, bool]] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | Conv1D) and id(weight := module.weight) not in spared:
            found[id(weight)] = (weight, isinstance(module, Conv1D))
    return list(found.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Loading prints bars and advice meant for interactive use; the scan has its own progress."""
    level: Callable[[], int] = transformers_logging.get_verbosity
    before = level()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
