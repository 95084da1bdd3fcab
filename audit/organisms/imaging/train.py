"""Teach a small image classifier, measure what it knows, and write it down with its history.

    model = new_classifier("vit", world.side, world.classes, seed=0)
    fit(model, joined(parts.forget, parts.retain), epochs=30, learning_rate=2e-3, seed=0)
    accuracy(model, parts.utility)
    save(model, folder)

The folder's image processor gives the pixels that were trained on (`world.images`). Under one seed, one number of
threads and one build of torch, the same call gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from audit.errors import BadInput
from audit.opened import quiet
from audit.organisms.imaging.method import logits
from audit.organisms.imaging.world import Images
from audit.organisms.train import Progress, finite, write_history

BASES = ("vit", "resnet")
Loss = Callable[[nn.Module, Images], Tensor]


@dataclass(frozen=True, slots=True)
class Teaching:
    """How a base is taught."""

    epochs: int
    learning_rate: float
    batch: int = 64
    weight_decay: float = 0.05

    @property
    def options(self) -> dict[str, Any]:
        """For `fit`."""
        return asdict(self)

    def shortened(self, share: float) -> Teaching:
        """For a share of the epochs."""
        return replace(self, epochs=max(1, round(share * self.epochs)))


TEACHING = {"vit": Teaching(30, 3e-3), "resnet": Teaching(12, 3e-3)}


def new_classifier(base: str, side: int, classes: Sequence[str], seed: int) -> PreTrainedModel:
    """An untrained ViT (0.1 M parameters) or ResNet (0.2 M) for images of `side` by `side` pixels.

    Raises:
        BadInput: another base.
    """
    if base not in BASES:
        raise BadInput(f"no base {base!r} for images (known: {', '.join(BASES)})")
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left as they were
        torch.manual_seed(seed)
        if base == "vit":
            patch = 2 if side <= 16 else 4
            shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
            # So few images are learned by heart without dropout, and slowly with the usual initial 0.02.
            habits: dict[str, Any] = {"hidden_dropout_prob": 0.1, "initializer_range": 0.1}
            config = ViTConfig(image_size=side, patch_size=patch, **shape, **habits, **named)
            return ViTForImageClassification(config).eval()
        # Its stem halves each side twice, so digits arrive at the first stage as 2 by 2.
        widths: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]}
        config = ResNetConfig(layer_type="basic", **widths, **named)
        config.image_size = side  # nothing in a ResNet says what it was trained on; `save` asks
        return ResNetForImageClassification(config).eval()


def cross_entropy(model: nn.Module, batch: Images) -> Tensor:
    """Mean cross-entropy of the labels."""
    return F.cross_entropy(logits(model, batch.pixels), batch.labels)


def fit(
    model: nn.Module,
    data: Images,
    *,
    learning_rate: float,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    batch: int = 64,
    loss: Loss = cross_entropy,
    parameters: Sequence[nn.Parameter] | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place, for so many `epochs` or so many `steps`; the loss of every step.

    AdamW, gradients clipped to norm 1, the learning rate rising over the first `warmup` of the steps and falling to 0
    over the rest. `seed` orders the images and draws the dropout, nothing else is random. Only `parameters` are
    stepped, all if None; what batch normalization keeps besides moves all the same, as the model is in training mode
    meanwhile.

    Raises:
        Diverged: the loss is no longer a number.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("say either epochs or steps")
    total = steps if steps is not None else (epochs or 0) * max(1, -(-len(data) // batch))
    rise = max(1, round(warmup * total))
    chosen = list(model.parameters()) if parameters is None else list(parameters)
    optimizer = torch.optim.AdamW(chosen, lr=learning_rate, weight_decay=weight_decay, fused=True)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in islice(endless(data, batch, seed), total):
            step = len(losses)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / rise, (total - step) / max(1, total - rise))
            value = loss(model, part)
            losses.append(finite(value, step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, total)
    model.zero_grad(set_to_none=True)
    model.eval()
    return losses


def endless(data: Images, batch: int, seed: int) -> Iterator[Images]:
    """Batches without end, in a new random order each time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from data.batches(batch, generator)


@torch.no_grad()
def all_logits(model: nn.Module, data: Images, batch: int = 512) -> Tensor:
    """[n, classes], in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    found = torch.cat([logits(model, part.pixels) for part in data.batches(batch)])
    model.train(training)
    return found


def accuracy(model: nn.Module, data: Images) -> float:
    """Share of images whose class gets the largest logit."""
    return float((all_logits(model, data).argmax(dim=-1) == data.labels).double().mean())


def save(model: PreTrainedModel, folder: Path, history: Mapping[str, Any] | None = None) -> Path:
    """Write an ordinary Hugging Face folder (safetensors, image processor), with its history if one is given."""
    side = int(model.config.image_size)
    half = [0.5] * 3
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        from transformers import ViTImageProcessor  # where torchvision is missing, says which one it takes instead

        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half).save_pretrained(folder)
    if history is not None:
        write_history(folder, history)
    return folder


def open_classifier(folder: Path) -> PreTrainedModel:
    """What `save` wrote, in evaluation mode."""
    with quiet():
        model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model.eval()
