"""Two models' weight files compared, tensor by tensor: what changed, by how much, and of what shape the change is.

    for row in compare(Path("models/suspect"), Path("models/original")):
        print(row.name, row.relative, row.stable_rank)

W is a tensor of the target, W0 the original's of the same name, both as float32, and D = W - W0. At most one tensor
of either model is in memory at a time, so that two models of any size can be compared on a small machine. Compared with
nothing, W0 = 0 and D = W: then rows describe the weights themselves.

What is *not* compared gets a row that says why: a tensor that one model lacks, shapes that differ, dtypes that are no
numbers by themselves (packed integers), values that are not finite. A model without an output head uses its embedding
for one: if only the other has a head, it is compared with that embedding.

Traps:

- *Dtypes.* A tensor stored in fewer bits than the original's differs from it everywhere, by rounding alone; `dtype` and
  `original_dtype` say so. And an update stored in bfloat16 is itself rounded, by up to 1/512 of each weight: where it
  is smaller than that, its rank is the rounding's.
- *Scaled codes* (float8 with a tensor of scales) are compared as they are stored, without their scales.
- *Fused experts* (three dimensions) have norms, but neither ranks nor int4 codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from audit.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from audit.evidence import Store

FORMAT = 1
"""Of the rows; part of the name they are kept under, so that numbers made otherwise are never served."""

AFTER_BLOCKS = 10**6
"""The `site` of what comes after all blocks: final norm and head."""

_INT4_TOP = 7
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


# --- plain functions on matrices ----------------------------------------------------------------------------


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values, each as a share of their sum (Roy & Vetterli 2007).

    Args:
        matrix: [m, n], or its singular values [k].

    Returns:
        From 1 (one direction) to min(m, n) (all alike). NaN for a matrix of zeros.
    """
    import torch

    values = _spectrum(matrix)
    total = values.sum()
    if total == 0:
        return math.nan
    share = values[values > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def stable_rank(matrix: Tensor) -> float:
    """Squared Frobenius norm over squared largest singular value (Rudelson & Vershynin 2007).

    Unlike the rank, and the effective rank, it hardly moves when small noise is added.

    Args:
        matrix: [m, n], or its singular values [k].

    Returns:
        From 1 to the rank. NaN for a matrix of zeros.
    """
    values = _spectrum(matrix)
    largest = values.max()
    return math.nan if largest == 0 else float((values / largest).square().sum())


def _spectrum(matrix: Tensor) -> Tensor:
    """Singular values [k] as float64."""
    import torch

    values = torch.linalg.svdvals(matrix.float()) if matrix.ndim == 2 else matrix
    return values.double()


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] from -7 to 7 and bin widths [out, 1]: round to nearest, symmetric in each output channel.

    The plain recipe (Dettmers & Zettlemoyer 2023, arXiv 2212.09720, without blocks). A row of zeros has width 0.
    """
    import torch

    width = weight.abs().amax(dim=1, keepdim=True) / _INT4_TOP
    return (weight / width.where(width > 0, torch.ones_like(width))).round(), width


def int4_codes_kept(target: Tensor, original: Tensor) -> float:
    """Share, 0 to 1, of weights [out, in] with the same int4 code in both models, each rounded with its own bins.

    What keeps its codes does not survive quantization (Zhang et al. 2024, arXiv 2410.16454): the int4 model is the
    original's. 1 says nothing of the change's size: what is rounded to int4 already keeps every code.
    """
    return float((int4_codes(target)[0] == int4_codes(original)[0]).double().mean())


# --- rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRow:
    """What changed in one tensor. Numbers are None where they could not be computed, or mean nothing.

    Attributes:
        name: in the target's files, or, if only the original has it, in the original's.
        shape: of the target's tensor, or of the only one.
        dtype, original_dtype: as stored; empty if a model lacks it.
        note: why there are no numbers, or what is special about them.
        norm: length of the difference, |D|_F.
        original_norm: |W0|_F.
        equal: how many entries are exactly equal.
        largest: max |D|.
        stable_rank, effective_rank: of D, where it has two dimensions and is not zero.
        int4_kept: share of weights whose int4 code is unchanged; two dimensions only.
        int4_step: max |D| over the width of the original's int4 bin, row by row; below 1/2 few codes can change.
        first, second, middle: the two largest singular values of D and their median, where it has ranks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    original_dtype: str = ""
    note: str = ""
    norm: float | None = None
    original_norm: float | None = None
    equal: int | None = None
    largest: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    int4_kept: float | None = None
    int4_step: float | None = None
    first: float | None = None
    second: float | None = None
    middle: float | None = None

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def compared(self) -> bool:
        """Was it in both models, and comparable?"""
        return self.norm is not None

    @property
    def relative(self) -> float | None:
        """|D| / |W0|; None where the original's is zero."""
        return self.norm / self.original_norm if self.norm is not None and self.original_norm else None

    @property
    def block(self) -> int | None:
        """The number of the block it lies in; None outside (embedding, final norm, head)."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)

    @property
    def embedding(self) -> bool:
        """Does it lie before the blocks?"""
        return self.block is None and (self.name.endswith(_EMBEDDINGS) or "wpe" in self.name)

    @property
    def site(self) -> int:
        """Where it acts: -1 the embedding, then the number of its block, a large number after the last."""
        return -1 if self.embedding else AFTER_BLOCKS if self.block is None else self.block

    @property
    def kind(self) -> str:
        """Its name without the number of its block: what it has in common with tensors of other blocks."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.name, count=1)


# --- where tensors come from --------------------------------------------------------------------------------


class Tensors(Protocol):
    """Named tensors that are read one at a time: a folder's files, or what a training run has in memory."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name, without reading any."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        ...


class Folder:
    """The tensors of a folder's safetensors files, sharded or not; read when asked for, and not kept.

    Raises:
        BadInput: no such file, one that cannot be read, or a tensor in two files.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not files:
            raise BadInput(f"{folder}: no safetensors files; weights of other formats (GGUF) are not compared")
        self._places: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BadInput(f"{path}: cannot be read ({error})") from None
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            for name in names:
                if name in self._places:
                    raise BadInput(f"{path}: tensor {name!r} is in another file too")
                self._places[name] = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, from the files' headers."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._places.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; its pages are mapped from the file."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor


class InMemory:
    """The parameters of a loaded model. Tied ones have one name, as in its files."""

    def __init__(self, model: Any) -> None:
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def read(self, name: str) -> Tensor:
        """One parameter, as it is now."""
        return self._parameters[name].detach()


class Zeros:
    """Nothing to compare with: zeros in the shapes of other tensors, which take no memory."""

    def __init__(self, like: Tensors) -> None:
        self._shapes = dict(like.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One tensor of zeros."""
        import torch

        return torch.zeros(()).expand(self._shapes[name])


# --- the comparison -----------------------------------------------------------------------------------------


def compare(
    target: Path, original: Path | None, *, device: str = "cpu", tick: Callable[[int], None] = lambda _: None
) -> list[TensorRow]:
    """A row for every tensor of two model folders, or of one compared with nothing, in the order of the blocks.

    Singular values are most of the cost: about m n min(m, n) operations a matrix, on `device`. `tick` is called with
    the number of tensors done.

    Raises:
        BadInput: a folder without safetensors files, such as one that holds GGUF.
    """
    rows, here = [], Folder(target)
    for row in compare_tensors(here, Zeros(here) if original is None else Folder(original), device=device):
        rows.append(row)
        tick(len(rows))
    return rows


def compare_tensors(target: Tensors, original: Tensors, *, device: str = "cpu") -> Iterator[TensorRow]:
    """A row for every tensor of either, in the order of the blocks, read when the row is asked for."""
    here, there = target.shapes(), original.shapes()
    pairs: dict[str, tuple[str | None, str | None]]
    pairs = {name: (name, name if name in there else _stand_in(name, here, there)) for name in here}
    pairs |= {name: (_stand_in(name, there, here), name) for name in there if name not in here}
    for name in sorted(pairs, key=_place):
        yield _row(name, *pairs[name], target, original, device)


def remember(store: Store, against: str, rows: Sequence[TensorRow]) -> None:
    """Note a comparison in the target's store; `against` is the digest of what it was compared with, or `nothing`."""
    store.remember(_note(against), [asdict(row) for row in rows])


def recall(store: Store, against: str) -> list[TensorRow] | None:
    """The comparison as noted in the target's store; None if it was not, or cannot be read."""
    try:
        return [TensorRow(**{**row, "shape": tuple(row["shape"])}) for row in store.recall(_note(against))]
    except (TypeError, KeyError):
        return None


def _note(against: str) -> str:
    return f"weights-{FORMAT}-{against}"


def _place(name: str) -> tuple[int, int, str]:
    """Sorts embeddings first, then blocks by their numbers, then the rest."""
    row = TensorRow(name, ())
    if row.block is not None:
        return 1, row.block, name
    return (0 if row.embedding else 2), 0, name


def _stand_in(name: str, mine: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str | None:
    """For a head that the other model lacks: the other's embedding, which it must be using instead."""
    if name not in _HEADS or any(head in others for head in _HEADS):
        return None
    found = [other for other in others if other.endswith(_EMBEDDINGS) and others[other] == mine[name]]
    return found[0] if len(found) == 1 else None


def _row(name: str, here: str | None, there: str | None, target: Tensors, original: Tensors, device: str) -> TensorRow:
    """One row. Both tensors are let go when it is done."""
    if here is None or there is None:
        only = target.read(name) if there is None else original.read(name)
        where, dtype = ("target", _dtype(only)) if there is None else ("original", "")
        return TensorRow(
            name, tuple(only.shape), dtype, "" if there is None else _dtype(only), note=f"only in the {where}"
        )
    now, before = target.read(here), original.read(there)
    known: dict[str, Any] = {"shape": tuple(now.shape), "dtype": _dtype(now), "original_dtype": _dtype(before)}
    if now.shape != before.shape:
        return TensorRow(name, **known, note=f"shapes differ: the original's is {_shape(before)}, not {_shape(now)}")
    if here != there:
        known["note"] = f"a head of its own, and {there if here == name else here} in the other model"
    w, w0 = _as_numbers(now), _as_numbers(before)
    if w is None or w0 is None:
        return TensorRow(name, **known | {"note": f"{_dtype(before if w0 is None else now)} holds no plain numbers"})
    if not (bool(w.isfinite().all()) and bool(w0.isfinite().all())):
        return TensorRow(name, **known | {"note": "holds values that are not finite"})
    return TensorRow(name, **known, **_measures(w.to(device), w0.to(device)))


def _measures(w: Tensor, w0: Tensor) -> dict[str, Any]:
    """The numbers of a row."""
    import torch

    change = w - w0
    found: dict[str, Any] = {
        "norm": float(torch.linalg.vector_norm(change, dtype=torch.float64)),
        "original_norm": float(torch.linalg.vector_norm(w0, dtype=torch.float64)),
        "equal": int((change == 0).sum()),
        "largest": float(change.abs().max()) if change.numel() else 0.0,
    }
    if change.ndim == 2 and change.numel():
        found |= {"int4_kept": int4_codes_kept(w, w0), "int4_step": _widest_step(change, w0)}
        if found["largest"]:
            del w, w0
            values = _spectrum(change)
            found |= {"stable_rank": stable_rank(values), "effective_rank": effective_rank(values)}
            found |= {"first": float(values[0]), "middle": float(values.median())}
            found["second"] = float(values[1]) if len(values) > 1 else 0.0
    return found


def _widest_step(change: Tensor, original: Tensor) -> float:
    """max |D| over the bin width of its row; rows of zeros, which have none, are left out."""
    width = original.abs().amax(dim=1) / _INT4_TOP
    steps = change.abs().amax(dim=1)[width > 0] / width[width > 0]
    return float(steps.max()) if steps.numel() else 0.0


def _as_numbers(tensor: Tensor) -> Tensor | None:
    """As float32, or None where the stored values are codes (packed integers, booleans, float4 in pairs)."""
    if not tensor.is_floating_point():
        return None
    try:
        return tensor.float()
    except (RuntimeError, NotImplementedError):
        return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
