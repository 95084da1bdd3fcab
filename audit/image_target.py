"""An opened image classifier: pictures, classes, and the places inside it.

    target = ImageTarget("target", take_inventory(folder))
    shown = target.show(example)                                            # scored: the example's class
    shown = target.show(example, parts=target.parts("blocks.3.hook_resid_post"))   # and, there, every patch or place

An image is a sequence of one scored position, its decision; the classes are what a vocabulary is to text. Where the
states of its parts at a site are wanted, they follow as further positions. So planner, evidence and quantities are
those of text.

The folder's own image processor resizes and scales. Places are called as in language models, counted over all stages:

    blocks.{i}.hook_resid_post   ViT, DeiT: a layer; Swin: a block of a stage; ResNet, ConvNeXT: a layer of a stage
    ln_final.hook_in             what enters the classifier

The state of a decision at a block is the class token's, or, where there is none, the mean over places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoImageProcessor, AutoModelForImageClassification

from audit.errors import BadInput, Refused
from audit.inventory import Inventory
from audit.loaders import Example
from audit.opened import OpenModel, quiet
from audit.passes import Pass, Recording, States
from audit.plan import Batch, Input, Work
from audit.tokens import Tokens, content_key

_IMAGE = -1
_TOKENS = 16  # what an image counts for in a batch
_MAPS = 20  # what a batch holds at a time, in pixels' worth
_PLACES: dict[str, tuple[str, bool]] = {
    "vit": ("vit.layers", True),
    "deit": ("deit.layers", True),
    "swin": ("swin.encoder.layers.*.blocks", False),
    "resnet": ("resnet.encoder.stages.*.layers", False),
    "convnext": ("convnext.encoder.stages.*.layers", False),
}
"""By `model_type`: the lists of blocks, and whether the first of a block's states is a class token's."""


@dataclass(frozen=True, slots=True)
class Shown(Tokens):
    """An image before the model, as a sequence: the decision is its first scored position, parts follow.

    Attributes:
        picture: digest of the pixels; part of the key.
        pixels: [height, width, 3], 8 bits a channel.
    """

    picture: str = ""
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    def begun(self, scored: int) -> Shown:
        """The image with its first `scored` positions scored."""
        return Shown(self.ids[: self.start + scored], self.start, (), picture=self.picture, pixels=self.pixels)

    @property
    def key(self) -> str:
        """Content address of picture and ids: 32 hex digits."""
        if not self._key:
            object.__setattr__(self, "_key", content_key(self.ids, tuple(self.picture.encode())))
        return self._key


class ImageTarget(OpenModel):
    """An image classifier under audit, or one it is compared with.

    Args:
        role, inventory, device, dtype, limit: see `OpenModel`.
        template: of no use here; taken so that all models are opened alike.
    """

    factory: ClassVar[Any] = AutoModelForImageClassification

    def __init__(
        self,
        role: str,
        inventory: Inventory,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        template: str = "auto",
        limit: int | None = None,
    ) -> None:
        super().__init__(role, inventory, device=device, dtype=dtype, template=template, limit=limit)
        self._parts: dict[str, int] = {}
        if self._config.model_type not in _PLACES:
            known = ", ".join(sorted(_PLACES))
            reason = f"image classifiers of type {self._config.model_type!r}"
            raise Refused(f"{inventory.root}: {reason}", f"audit one of a known type ({known})")

    # --- images and classes ---------------------------------------------------------------------------

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the outputs."""
        names = self._config.id2label
        return [str(names[i]) for i in range(len(names))]

    def label(self, answer: str) -> int:
        """The output that stands for a class, by name, or by number where no class is called so.

        Raises:
            BadInput: the model has no such class.
        """
        if answer in self.classes:
            return self.classes.index(answer)
        if answer.isdigit() and int(answer) < len(self.classes):
            return int(answer)
        few = ", ".join(self.classes[:12]) + (", …" if len(self.classes) > 12 else "")
        raise BadInput(f"{self.inventory.root}: no class {answer!r}; its classes: {few}")

    def show(self, example: Example, *, parts: int = 0) -> Shown:
        """An example as the model sees it; scored is its class. `parts`: places whose states are wanted besides.

        Raises:
            BadInput: the example has no picture, or a class that the model lacks.
        """
        if example.picture is None:
            raise BadInput(f"{example.source}: holds no image, and {self.inventory.architecture} reads nothing else")
        ids = (_IMAGE, *[self.label(example.answer)] * (1 + parts))
        return Shown(ids, 1, picture=example.picture.digest, pixels=example.picture.pixels)

    def parts(self, site: str) -> int:
        """Number of patches, or of places of the feature map, that a state at this site has; needs the weights."""
        if site not in self._parts:
            with torch.inference_mode(), Recording(self, [site], self.places) as states:
                self.model(pixel_values=self.pixels([np.zeros((8, 8, 3), np.uint8)]))
            self._parts[site] = states[site].shape[1] - 1
        return self._parts[site]

    @cached_property
    def processor(self) -> Any:
        """The folder's own."""
        with quiet():
            return self._load(AutoImageProcessor)

    def pixels(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Images [height, width, 3] as the model takes them, [batch, channels, height, width]."""
        taken = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        channels = int(getattr(self._config, "num_channels", 3))
        values: torch.Tensor = taken["pixel_values"][:, :channels]
        return values.to(self.device, self.dtype)

    @property
    def token_bytes(self) -> int:
        """A sixteenth of an image's maps, by the size of its pixels."""
        size = getattr(self._config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return max(1, _MAPS * 3 * int(height) * int(width) * self.dtype.itemsize // _TOKENS)

    # --- places ---------------------------------------------------------------------------------------

    @cached_property
    def _block_paths(self) -> list[str]:
        pattern = _PLACES[self._config.model_type][0]
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\.\d+")
        return [name for name, _ in self.model.named_modules() if wanted.fullmatch(name)]

    @property
    def blocks(self) -> list[str]:
        """Module paths of the blocks of all stages."""
        return self._block_paths

    @property
    def output_head(self) -> torch.nn.Module:
        """The classifier."""
        head: torch.nn.Module = self.model.classifier
        return head

    def loss(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Over the batch's decisions."""
        logits = self.model(pixel_values=self.pixels([_pixels(tokens) for tokens in rows])).logits.float()
        labels = torch.tensor([tokens.ids[tokens.start] for tokens in rows], device=self.device)
        return torch.nn.functional.cross_entropy(logits, labels)

    def question(self, example: Example) -> Shown:
        """An image, its class scored."""
        return self.show(example)

    @property
    def layers(self) -> int:
        """Number of blocks, over all stages."""
        return len(self.blocks)

    def site(self, name: str) -> tuple[torch.nn.Module, str]:
        """The module behind `blocks.{i}.hook_resid_pre|hook_resid_post` or `ln_final.hook_in`, and the side meant."""
        block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name)
        if name == "ln_final.hook_in":
            return self.model.classifier, "input"
        if block is None or int(block[1]) >= self.layers:
            raise BadInput(f"{self.inventory.root}: no place named {name!r} in {self.inventory.architecture}")
        return self.model.get_submodule(self.blocks[int(block[1])]), "input" if block[2] == "pre" else "output"

    def places(self, state: torch.Tensor) -> torch.Tensor:
        """What a module passes on as [batch, 1 + places, width]: the decision's state first."""
        if state.ndim == 2:  # what enters the classifier has no places left
            return state[:, None]
        if state.ndim == 4:  # [batch, channels, height, width]; 1 by 1 where it was pooled
            state = state.flatten(2).transpose(1, 2)
            return state if state.shape[1] == 1 else torch.cat([state.mean(dim=1, keepdim=True), state], dim=1)
        if _PLACES[self._config.model_type][1]:
            return state
        return torch.cat([state.mean(dim=1, keepdim=True), state], dim=1)

    def passes(self, share: bool) -> ImagePass:  # noqa: ARG002
        """Batches of images; no two have a beginning in common."""
        return ImagePass(self)


class ImagePass(Pass):
    """Through an image classifier."""

    target: ImageTarget

    def _prepare(self) -> None:
        self._model = self.target.model
        self._head: Callable[[torch.Tensor], torch.Tensor] = self._model.classifier

    def batches(self, works: Sequence[Work], token_budget: int) -> list[Batch]:
        """Works by image, so that each passes once, in batches of one size."""
        found: dict[str, list[Work]] = {}
        for work in works:
            assert isinstance(work.tokens, Shown), "made by ImageTarget.show"
            found.setdefault(work.tokens.picture, []).append(work)
        inputs = [Input((_IMAGE,), tuple(found[picture])) for picture in sorted(found)]
        size = max(1, token_budget // _TOKENS)
        return [Batch(0, tuple((row,) for row in inputs[i : i + size])) for i in range(0, len(inputs), size)]

    def run(self, batch: Batch, order: Sequence[int], sites: Sequence[str]) -> tuple[torch.Tensor, States]:
        """States of every decision, followed by those of its image's parts where they are wanted."""
        works = [(row, work) for row, source in enumerate(batch.inputs) for work in source.works]
        for _, work in works:
            for site in (site for quantity in work.quantities for site in quantity.sites if work.tokens.scored > 1):
                if work.tokens.scored != 1 + self.target.parts(site):
                    raise ValueError(f"{work.tokens.scored - 1} parts wanted at {site}, not {self.target.parts(site)}")
        pixels = self.target.pixels([_pixels(source.works[0].tokens) for source in batch.inputs])
        placed = [(row, place) for row, work in (works[i] for i in order) for place in range(work.tokens.scored)]
        rows, wanted = (torch.tensor(each, device=pixels.device) for each in zip(*placed, strict=True))

        def keep(state: torch.Tensor) -> torch.Tensor:
            states = self.target.places(state)
            # Positions beyond a site's places belong to works that ask for another site.
            return states[rows, wanted.clamp_max(states.shape[1] - 1)]

        with Recording(self.target, ["ln_final.hook_in", *sites], keep) as states:
            self._model(pixel_values=pixels)
        return states["ln_final.hook_in"], states

    def head(self, state: torch.Tensor) -> torch.Tensor:
        """The classifier."""
        flattened = isinstance(self._head, torch.nn.Sequential)  # ResNet's flattens a map of 1 by 1 first
        return self._head(state[..., None, None] if flattened else state).float()

    def norm(self, state: torch.Tensor) -> torch.Tensor:
        """An inner state of a decision before the classifier. Raises BadInput where its width is another's."""
        norm = getattr(self._model.base_model, "layernorm", None)
        try:
            normed: torch.Tensor = state if norm is None else norm(state)
        except RuntimeError:
            raise BadInput(f"{self.target.inventory.root}: its classifier cannot be applied to inner states") from None
        return normed

    def plain(self, tokens: Tokens) -> torch.Tensor:
        """One image alone."""
        logits: torch.Tensor = self.target.model(pixel_values=self.target.pixels([_pixels(tokens)])).logits.float()
        return logits.expand(tokens.scored, -1)

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return len(self.target.classes)


def _pixels(tokens: Tokens) -> NDArray[np.uint8]:
    assert isinstance(tokens, Shown) and tokens.pixels is not None, "made by ImageTarget.show"
    return tokens.pixels
