"""Images and their classes, from the formats that data sets of images come in.

    a folder with a folder of images for every class          train/cat/1.png
    an .npz file with arrays X [n, height, width(, 3)] and y   digits.npz, or digits.npz?split=train
        any other array [n], such as group or entity, is a column (grouptrain, train_group: of a split)
    a Parquet file with a column of images                     as `datasets` writes them: bytes and path

A row is an `Example` without a prompt: its answer is the class, by name where the file has names. Rows are chosen as
text rows are: `digits.npz?label=3&limit=100`. Pixels are kept as they are, 8 bits a channel; what a model's folder says
of resizing and scaling is done when they are shown to it (`audit.image_target`).
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.errors import BadInput

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_X, _Y = ("X", "x", "images", "image", "data"), ("y", "Y", "labels", "label", "targets")
_SPLITS = ("train", "test", "val", "tr", "te")
_MOST_PIXELS = 64_000_000

MOST_BYTES = 8 * 2**30
"""Of a file, or of what it unpacks to: rows are held in memory, several times over."""


@dataclass(frozen=True)
class Picture:
    """An image: `pixels` [height, width, 3], 8 bits a channel; `digest` is the SHA-256 of its shape and pixels."""

    digest: str
    pixels: NDArray[np.uint8] = field(compare=False, repr=False)


def picture(pixels: Any) -> Picture:
    """A picture of an array [height, width], [height, width, 1], 3 or 4 channels, 0 to 255, whole numbers.

    Raises:
        ValueError: another shape or kind of number, or no pixel at all.
    """
    array = np.asarray(pixels)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(f"an array of shape {np.shape(pixels)} is no image [height, width(, channels)]")
    if array.dtype != np.uint8:
        with np.errstate(invalid="ignore"):  # of NaN, which no whole number equals
            whole = array.astype(np.int64) if array.dtype.kind in "iuf" else None
        if whole is None or (whole != array).any() or whole.min() < 0 or whole.max() > 255:
            raise ValueError(f"an image of {array.dtype} that is not whole numbers from 0 to 255")
        array = whole.astype(np.uint8)
    array = np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3])
    return Picture(hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest(), array)


def png(image: Picture, most: int = 64) -> bytes:
    """The picture as PNG for a report, no side longer than `most`."""
    from PIL import Image

    shown = Image.fromarray(image.pixels)
    shown.thumbnail((most, most))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def holds_pictures(path: Path) -> bool:
    """Is this a folder, or an archive, of images rather than of texts?"""
    if path.is_dir():
        return any(file.suffix.lower() in IMAGES for folder in _folders(path) for file in folder.iterdir())
    return path.suffix.lower() == ".npz"


def read_pictures(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as (place, {"image": Picture, "label": class, …}); raises BadInput, naming file and row."""
    return _image_folder(path) if path.is_dir() else _npz(path)


def image_column(schema: Any) -> str | None:
    """The column of a Parquet file (by its Arrow schema) that holds images, as `datasets` writes them."""
    import pyarrow

    kinds = {column: schema.field(column).type for column in schema.names}
    structs = [c for c, kind in kinds.items() if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    plain = [c for c, kind in kinds.items() if pyarrow.types.is_binary(kind) and c in ("image", "img", "png", "jpg")]
    return next(iter([*structs, *plain]), None)


def with_picture(row: dict[str, Any], column: str, place: str) -> dict[str, Any]:
    """The row with the image that its `column` encodes under `image`; raises BadInput."""
    further = {name: value for name, value in row.items() if name != column}
    data = row[column].get("bytes") if isinstance(row[column], dict) else row[column]
    if not isinstance(data, bytes):
        raise BadInput(f"{place}: column {column!r} holds no bytes of an image")
    return {**further, "image": _decoded(data, place)}


def _decoded(data: bytes | Path, place: str) -> Picture:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below, or of metadata that nobody asks for
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise BadInput(f"{place}: an image of {image.width} by {image.height} pixels is too large")
                if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:  # a camera's preview
                    raise BadInput(f"{place}: holds {frames} frames, of which nobody says which is meant")
                if image.mode.startswith(("I", "F")):  # which Pillow cuts off at 255 rather than scaling
                    raise BadInput(f"{place}: an image of mode {image.mode}: 8 bits a channel are expected")
                return picture(np.asarray(image.convert("RGB")))
    except BadInput:
        raise
    except Exception as error:  # a decoder raises whatever its damaged bytes run into
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{place}: not a readable image: {said}") from None


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir())


def _image_folder(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place in (path, *(inner for folder in _folders(path) for inner in _folders(folder))):
        # An image that no class or two classes claim would be left out in silence.
        if astray := sorted(file for file in place.iterdir() if file.suffix.lower() in IMAGES):
            raise BadInput(
                f"{astray[0]}: lies in no folder of a class: {path} holds one folder a class, each its images"
            )
    for folder in _folders(path):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in IMAGES:
                yield str(file), {"image": _decoded(file, str(file)), "label": folder.name}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names, size = archive.namelist(), sum(item.file_size for item in archive.infolist())
        if size > MOST_BYTES:
            raise BadInput(f"{path}: unpacks to {size} bytes: more than a set may hold, {MOST_BYTES}")
        if len(set(names)) < len(names):
            raise BadInput(f"{path}: holds two arrays of one name")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # zip, deflate and array headers each have errors of their own
        raise BadInput(f"{path}: not a readable .npz: {' '.join(str(error).split())}") from None
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise BadInput(f"{path}: {strange[0]} is no array")
    return arrays


def _npz(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    arrays = _arrays(path)
    found = [(split, x, y) for split, x, y in _pairs(arrays) if x in arrays and y in arrays]
    if not found:
        raise BadInput(f"{path}: no arrays X and y (or X and y of a split); it holds {', '.join(sorted(arrays))}")
    for name, times in Counter(name for _, x, y in found for name in (x, y)).items():
        if times > 1:
            pairs = ", ".join(f"{x} with {y}" for _, x, y in found)
            raise BadInput(f"{path}: {name} is claimed more than once: {pairs}")
    names = arrays.get("classes")
    known = {"classes", *(name for _, x, y in found for name in (x, y))}
    for split, x, y in found:
        images, labels = arrays[x], arrays[y]
        count = len(images) if images.ndim else 0
        if labels.shape != (count,):
            raise BadInput(f"{path}: {x} has {count} images, {y} is of shape {labels.shape}")
        columns = {
            column: array.tolist()
            for name, array in arrays.items()
            if name not in known and array.shape == labels.shape and (column := _column(name, split))
        }
        for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = f"{path}: {x}[{row}]"
            try:
                shown = picture(image)
            except ValueError as error:
                raise BadInput(f"{place}: {error}") from None
            named = label if names is None else _class(names, label, f"{path}: {y}[{row}]")
            further = {column: values[row] for column, values in columns.items()}
            yield place, {**further, "image": shown, "label": named, "split": split, "row": row}


def _class(names: NDArray[Any], label: Any, place: str) -> str:
    """The name of a class by its number; from the end, as Python counts, is not meant."""
    if names.ndim != 1 or not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(names):
        raise BadInput(f"{place}: {label!r} is no index into classes, of shape {names.shape}")
    return str(names[label])


def _pairs(arrays: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(split, name of the images, name of the labels) as they may be called."""
    names = list(arrays)
    for split in ("", *_SPLITS):
        for x in _X:
            for y in _Y:
                for form in (x + split, f"{x}_{split}", f"{split}_{x}") if split else (x,):
                    if form in names:
                        yield split, form, form.replace(x, y)


def _column(name: str, split: str) -> str:
    """What an array of a split is called without it; empty where it is not of this split."""
    if not split:
        return name
    if name.startswith(f"{split}_"):
        return name.removeprefix(f"{split}_")
    return name.removesuffix(split).removesuffix("_") if name.endswith(split) else ""
