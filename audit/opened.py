"""An opened model of any kind: its folder, its weights, and the views of it that an attack has altered.

A folder is opened only after its inventory was taken (`audit.inventory`), with remote code and the network
ruled out explicitly, through a folder of links that holds nothing but the files that were checked. The weights are
read when a pass, or an instrument, first needs them; where they do not fit in memory, again and again in parts
(`audit.memory`). What is particular to language models is in `audit.target`, to image classifiers in
`audit.image_target`.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from audit.memory import Memory, physical

if TYPE_CHECKING:
    from audit.capture import Engine
    from audit.loaders import Example
    from audit.passes import Pass
    from audit.quantities import Quantity
    from audit.tokens import Tokens


class OpenModel(ABC):
    """A model under audit, or one it is compared with.

    Args:
        role: `target`, `original` or `retrained`; an attacked model is `target+relearn@20`.
        inventory: what `take_inventory` found in the folder.
        device: a torch device.
        dtype: of the weights in memory.
        template: how a prompt becomes text, where there are prompts.
        limit: bytes of memory that the scan may take; None: as many as it needs.
    """

    factory: ClassVar[Any]
    """The auto class of transformers that reads such models."""
    searches: ClassVar[bool] = True
    """Can it be asked for the ends of a beam search?"""

    def __init__(
        self,
        role: str,
        inventory: Inventory,
        *,
        device: str,
        dtype: torch.dtype,
        template: str = "auto",
        limit: int | None = None,
    ) -> None:
        self.role = role
        self.inventory = inventory
        self.digest = inventory.digest
        self.device = torch.device(device)
        self.dtype = dtype
        self.template = template
        self.limit = limit
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

    def engine(self) -> Engine:
        """What runs the plan's requests."""
        from audit.capture import Engine

        return Engine(self)

    def gives(self, quantity: Quantity) -> bool:  # noqa: ARG002
        """Can this be recorded of the model? All can, where its weights are at hand."""
        return True

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
                parts = self._in_parts()
                dtype = self._stored if parts else self.dtype
                model, found = self._load(self.factory, dtype=dtype, output_loading_info=True, **parts)
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
            if parts:
                _convert(model, dtype, self.dtype)
            else:
                model = model.to(self.device)
            self._model = model.eval().requires_grad_(False)
        return self._model

    # --- memory ---------------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> Memory | None:
        """How what the scan may take is shared out for this model; None where nothing bounds it. Needs no weights."""
        limit, whose = self.limit, "stated"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            if limit is None or total < limit:
                limit, whose = total, "GPU's"
        if limit is None:
            return None
        with quiet(), torch.device("meta"):
            outline = self.factory.from_config(self._config, dtype=self.dtype, trust_remote_code=False)
        parts = [sum(p.numel() for p in module.parameters(recurse=False)) for module in outline.modules()]
        files = sum(file.size for file in self.inventory.files if file.path in self.inventory.weight_files)
        alike = {tensor.dtype for tensor in self.inventory.tensors} == {str(self.dtype).removeprefix("torch.")}
        return Memory(
            limit,
            weights=sum(p.nbytes for p in (*outline.parameters(), *outline.buffers())),
            module=max(parts) * (self._stored.itemsize + self.dtype.itemsize),
            token=self.token_bytes,
            whose=whose,
            mapped=0 if alike else files,
        )

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """What a token of a batch takes in memory, at most; needs no weights."""

    @property
    def _stored(self) -> torch.dtype:
        """In which dtype all weights lie in the folder; if there are several, the one wanted in memory."""
        found = {tensor.dtype for tensor in self.inventory.tensors}
        stored = getattr(torch, found.pop(), None) if len(found) == 1 else None
        return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else self.dtype

    def _in_parts(self) -> dict[str, Any]:
        """How weights that do not fit in memory whole are loaded: what fits; the rest is read when a pass needs it.

        They are loaded as they are stored, for to convert them now all would have to be read. What stays in memory
        lies there twice while it is converted.
        """
        memory = self.memory
        if memory is None or memory.holds():
            return {}
        if self.inventory.format == "gguf":
            raise BadInput(f"{self.inventory.root}: {memory.lacking()}, and GGUF weights cannot be read in parts")
        try:
            most: dict[int | str, int] = {"cpu": memory.kept}
            if self.device.type == "cuda":
                host = replace(memory, limit=self.limit or physical(), whose="main")
                most = {self.device.index or 0: memory.kept, "cpu": host.kept}
            if self._stored != self.dtype:
                size = self._stored.itemsize
                most = {place: kept * size // (size + self.dtype.itemsize) for place, kept in most.items()}
        except BadInput as error:
            raise BadInput(f"{self.inventory.root}: {error}") from None
        if not hasattr(self, "_written"):  # for what cannot be read as it is stored: experts that are fused, say
            self._written = TemporaryDirectory(prefix="palimpsest-")
        return {"device_map": "auto", "max_memory": most, "offload_folder": self._written.name}

    def weights_of(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A module's own parameters by name, read from the folder where they are not in memory."""
        found: dict[str, torch.Tensor] = {}
        hook = getattr(module, "_hf_hook", None)
        maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
        for name, parameter in module.named_parameters(recurse=False):
            held = parameter.detach()
            found[name] = next(read[name] for read in maps if read) if held.is_meta else held
        return found

    def apart(self, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of a module without parts, such as a norm: in float32, on the CPU."""
        from accelerate.hooks import remove_hook_from_module

        copied: torch.nn.Module = remove_hook_from_module(copy.deepcopy(module))
        for name, value in self.weights_of(module).items():
            setattr(copied, name, torch.nn.Parameter(value.float().cpu().clone(), requires_grad=False))
        return copied.float().cpu()

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of the folder that the architecture does not use; reads the weights if nothing has yet.

        None are known where memory is too small to open the model: its files can be compared all the same.
        """
        if self._unused is None and (self.memory is None or self.memory.holds() or self.memory.streams):
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
        return type(self)(
            role,
            inventory,
            device=str(self.device),
            dtype=self.dtype,
            template=self.template,
            limit=self.limit,
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


def _convert(model: Any, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Have weights in another dtype: those in memory now, those that are not whenever they are read."""
    for tensor in model.state_dict(keep_vars=True).values():
        if stored != wanted and tensor.dtype == stored:
            tensor.data = tensor.data.to(wanted)


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
    placing = logging.getLogger("accelerate.big_modeling")
    placing_before = placing.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    placing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        placing.setLevel(placing_before)
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
