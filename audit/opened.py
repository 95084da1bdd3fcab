"""An opened model of any kind: its folder, its weights, and the views of it that an attack has altered.

A folder is opened only after its inventory was taken (`audit.inventory`), with remote code and the network
ruled out explicitly, through a folder of links that holds nothing but the files that were checked. The weights are
read when a pass, or an instrument, first needs them. What is particular to language models is in `audit.target`, to
image classifiers in `audit.image_target`.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from audit.errors import BadInput, Refused
from audit.inventory import Inventory

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
        """Weights of all linear maps and convolutions inside the blocks and between them; not embeddings and head.

        With each: is it stored [in, out], as GPT-2 does, rather than [out, in, …]?
        """
        kinds = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)
        head = {id(parameter) for parameter in self.output_head.parameters()}
        found: dict[int, tuple[torch.Tensor, bool]] = {}
        for module in self.model.modules():
            if isinstance(module, kinds) and id(weight := module.weight) not in head:
                found[id(weight)] = (weight, isinstance(module, Conv1D))
        return list(found.values())

    def decode(self, ids: tuple[int, ...]) -> str:  # noqa: ARG002
        """Text of token ids. Raises BadInput where the model writes none."""
        raise BadInput(f"{self.inventory.root}: {self.inventory.architecture} writes no text")

    @property
    def cut(self) -> int:
        """How many inputs were too long for the model, and were cut."""
        return 0

    def _load(self, factory: Any, **options: Any) -> Any:
        root, view = self.inventory.root, self._view.name
        if self.inventory.format == "gguf":
            options["gguf_file"] = self.inventory.weight_files[0]
        try:
            opened = factory.from_pretrained(view, trust_remote_code=False, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].replace(view, str(root))
            raise Refused(
                f"{root}: cannot be opened: {reason}", "only what transformers opens can be audited"
            ) from None
        self.inventory.refuse_changes()
        return opened

    @cached_property
    def _view(self) -> TemporaryDirectory[str]:
        """A folder of links to the files that were checked: what was set aside, or came since, no loader sees.

        Those in subfolders are left out, save further chat templates: no loader reads them, and a repository's
        history may have thousands.
        """
        view = TemporaryDirectory(prefix="palimpsest-")
        for name in (file.path for file in self.inventory.files):
            within = "/" not in name or name.startswith("additional_chat_templates/")
            if within and name not in self.inventory.aside:
                link = Path(view.name) / name
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(self.inventory.root / name)
        return view

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
                reason = f"no tensor {missing[0]}{more} in the weights"
                raise Refused(f"{self.inventory.root}: {reason}", "have the whole model saved again")
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

    def beside(self, role: str, inventory: Inventory) -> Self:
        """Another model folder, opened in the same way."""
        return type(self)(role, inventory, device=str(self.device), dtype=self.dtype, template=self.template)

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
