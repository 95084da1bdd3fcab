"""Images to teach and to forget, and the sets that an audit of them needs.

    world = digits(seed=0)                                  # or from_npz("fashion_5000.npz", seed=0)
    parts = split(world, seed=0)                            # by class; kind="instance" forgets single images
    parts.forget, parts.holdout, parts.retain, parts.utility
    parts.write_sets(Path("sets"))                          # forget.npz, …: what `audit scan --forget` reads

By class: `forget` is one class, `holdout` another that no model of the family is ever taught although it has an output
for it, `retain` the rest, `utility` unseen images of the rest. By instance: `forget` is a share of the training images
over all classes, `holdout` unseen images of the same classes, `utility` the other unseen ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.errors import BadInput
from audit.pictures import picture, read_pictures

KINDS = ("class", "instance")
PARTS = ("forget", "holdout", "retain", "utility")
_TEST_SHARE, _FORGET_SHARE = 0.25, 0.1
_HALF = 127.5
"""Pixels 0 to 255 become -1 to 1: mean and standard deviation 0.5 in the words of an image processor."""


@dataclass(frozen=True)
class Images:
    """Images as a model takes them: `pixels` [n, 3, height, width] float32 from -1 to 1, `labels` [n] int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def present(self) -> list[int]:
        """The classes that occur."""
        return sorted({int(label) for label in self.labels.tolist()})

    def take(self, index: Tensor) -> Images:
        """Some of them, by number or by mask."""
        return Images(self.pixels[index], self.labels[index])

    def of(self, classes: Iterable[int]) -> Images:
        """Those of these classes."""
        return self.take(torch.isin(self.labels, torch.tensor(sorted(classes), dtype=torch.long)))

    def labelled(self, labels: Tensor) -> Images:
        """The same images under other labels."""
        return Images(self.pixels, labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Images]:
        """All of them once, in batches of almost one size, at most `size`; in random order if given a generator.

        No batch is a small rest: batch normalization cannot do with a single image.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in order.tensor_split(max(1, -(-len(self) // size))):
            yield self.take(index)

    def bytes(self) -> NDArray[np.uint8]:
        """Pixels as they are stored, [n, height, width, 3] of 8 bits."""
        whole = (self.pixels * _HALF + _HALF).round().to(torch.uint8)
        return np.ascontiguousarray(whole.permute(0, 2, 3, 1).numpy())


def joined(*parts: Images) -> Images:
    """Several as one."""
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def images(pixels: Any, labels: Any) -> Images:
    """From arrays [n, height, width(, 3)] of whole numbers 0 to 255, and class numbers [n].

    Raises:
        ValueError: an image is none.
    """
    stored = np.stack([picture(each).pixels for each in pixels])
    scaled = (torch.from_numpy(stored).permute(0, 3, 1, 2).float() - _HALF) / _HALF
    return Images(scaled.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.long))


@dataclass(frozen=True)
class ImageWorld:
    """A set of images: what may be taught, what is kept for testing, and what its classes are called."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]

    @property
    def side(self) -> int:
        """Height of an image, which is its width."""
        return int(self.train.pixels.shape[-1])


@dataclass(frozen=True)
class Split:
    """The parts of a world by what is to become of them.

    Attributes:
        forgotten: the class to be forgotten; None where single images are.
        withheld: the class that no model is ever taught; None where single images are forgotten.
    """

    classes: tuple[str, ...]
    forgotten: int | None
    withheld: int | None
    forget: Images
    holdout: Images
    retain: Images
    utility: Images

    @property
    def parts(self) -> Mapping[str, Images]:
        """By name."""
        return {name: getattr(self, name) for name in PARTS}

    def write_sets(self, folder: Path, most: int | None = None) -> dict[str, Path]:
        """Each part as an .npz with X, y and classes, at most `most` images of it; the paths by part."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.npz" for name in PARTS}
        for name, part in self.parts.items():
            chosen = part if most is None else part.take(torch.arange(min(most, len(part))))
            np.savez_compressed(
                paths[name], X=chosen.bytes(), y=chosen.labels.numpy().astype(np.uint8), classes=np.array(self.classes)
            )
        return paths


def digits(seed: int) -> ImageWorld:
    """The 1,797 digits of scikit-learn, 8 by 8 pixels, a quarter of them for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return _parted("digits", images((found.images * 255 / 16).round(), found.target), names, seed)


def from_npz(path: Path, seed: int) -> ImageWorld:
    """A world of an .npz as `audit.pictures` reads them; a quarter is for testing where the file does not say.

    Raises:
        BadInput: not a readable .npz of images, or images that are not square and of one size.
    """
    rows = [row for _, row in read_pictures(Path(path))]
    shapes = {row["image"].pixels.shape for row in rows}
    if len(shapes) != 1 or len({*next(iter(shapes))[:2]}) != 1:
        raise BadInput(f"{path}: images of {len(shapes)} sizes, or not square, make no world to train in")
    found = sorted({row["label"] for row in rows})
    classes = tuple(map(str, found))
    number = {label: i for i, label in enumerate(found)}
    name = Path(path).stem.split("_")[0]

    def part(chosen: list[dict[str, Any]]) -> Images:
        return images([row["image"].pixels for row in chosen], [number[row["label"]] for row in chosen])

    test = [row for row in rows if row["split"] in ("test", "te")]
    if not test:
        return _parted(name, part(rows), classes, seed)
    train = part([row for row in rows if row["split"] in ("train", "tr")])
    return ImageWorld(name, train.take(torch.randperm(len(train), generator=_generator(seed))), part(test), classes)


def _parted(name: str, every: Images, classes: tuple[str, ...], seed: int) -> ImageWorld:
    order = torch.randperm(len(every), generator=_generator(seed))
    held = round(_TEST_SHARE * len(every))
    return ImageWorld(name, every.take(order[held:]), every.take(order[:held]), classes)


def split(world: ImageWorld, seed: int, kind: str = "class") -> Split:
    """What is to be forgotten, drawn by the seed.

    Raises:
        BadInput: another kind than "class" or "instance", or too few classes.
    """
    if kind not in KINDS:
        raise BadInput(f"images are forgotten by {' or by '.join(KINDS)}, not by {kind!r}")
    generator = _generator(seed + 1)
    if kind == "instance":
        order = torch.randperm(len(world.train), generator=generator)
        count, half = round(_FORGET_SHARE * len(order)), len(world.test) // 2
        forget, retain = world.train.take(order[:count]), world.train.take(order[count:])
        unseen = torch.arange(len(world.test))
        holdout, utility = world.test.take(unseen[:half]), world.test.take(unseen[half:])
        return Split(world.classes, None, None, forget, holdout, retain, utility)
    if len(world.classes) < 4:
        raise BadInput(f"{len(world.classes)} classes: one to forget and one to withhold leave too few")
    drawn = torch.randperm(len(world.classes), generator=generator).tolist()
    forgotten, withheld, kept = drawn[0], drawn[1], drawn[2:]
    train, test = world.train, world.test
    parts = (train.of([forgotten]), train.of([withheld]), train.of(kept), test.of(kept))
    return Split(world.classes, forgotten, withheld, *parts)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
