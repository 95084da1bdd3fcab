"""Two models' weight files compared, tensor by tensor: what changed, by how much, and of what shape the change is.

    for row in compare(Path("models/suspect"), Path("models/original")):
        print(row.name, row.relative, row.stable_rank)

W is a tensor of the target, W0 the original's of the same name, both as float32, and D = W - W0. Both are read a few
rows at a time, and nothing is mapped: in memory is D at most, and of a large matrix that is taller than wide (an
embedding) only D'D, so that two models of any size can be compared on a small machine. Compared with nothing, W0 = 0
and D = W: then rows describe the weights themselves.

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

from audit.errors import BadInput, Refused
from audit.safetensors_header import Span, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from audit.evidence import Store

FORMAT = 2
"""Of the rows; part of the name they are kept under, so that numbers made otherwise are never served."""

AFTER_BLOCKS = 10**6
"""The `site` of what comes after all blocks: final norm and head."""

_INT4_TOP = 7
_PIECE = 2**22
"""Entries that are read at a time: 16 MiB of float32. Singular values of a matrix with more are the roots of the
eigenvalues of D'D or DD', in float64: as precise as those of D in float32, in a fraction of the time and memory."""
_PACKED = {"float4_e2m1fn": "float4_e2m1fn_x2"}
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

    def read(self, name: str, rows: slice = ...) -> Tensor:
        """One tensor, in its own dtype, or some of its rows."""
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
        self._places: dict[str, tuple[Path, int, Span]] = {}
        for path in files:
            try:
                header = read_safetensors_header(path)
            except (OSError, Refused) as error:
                raise BadInput(f"{path}: cannot be read ({error})") from None
            for span in header.tensors:
                if span.name in self._places:
                    raise BadInput(f"{path}: tensor {span.name!r} is in another file too")
                self._places[span.name] = path, header.data_begin, span

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, from the files' headers; of numbers packed in pairs, that of the pairs."""
        return {name: self._shape(span) for name, (_, _, span) in self._places.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One tensor, or some of its rows. Read, not mapped: pages of a mapped file would stay with the process."""
        import torch

        path, data_begin, span = self._places[name]
        dtype = getattr(torch, _PACKED.get(span.dtype, span.dtype), None)
        if dtype is None:
            raise BadInput(f"{path}: tensor {name!r} is of dtype {span.dtype}, which PyTorch does not know")
        shape = self._shape(span)
        begin, end = span.begin, span.end
        if shape and rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            size = (end - begin) // shape[0]
            begin, end, shape = begin + first * size, begin + last * size, (last - first, *shape[1:])
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(end - begin)
        with path.open("rb") as file:
            file.seek(data_begin + begin)
            if file.readinto(data) != len(data):
                raise BadInput(f"{path}: changed while it was read")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    @staticmethod
    def _shape(span: Span) -> tuple[int, ...]:
        return (*span.shape[:-1], span.shape[-1] // 2) if span.dtype in _PACKED and span.shape else span.shape


class InMemory:
    """The parameters of a loaded model. Tied ones have one name, as in its files."""

    def __init__(self, model: Any) -> None:
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One parameter, as it is now, or some of its rows."""
        whole = self._parameters[name].detach()
        return whole if rows == slice(None) else whole[rows]


class Zeros:
    """Nothing to compare with: zeros in the shapes of other tensors, which take no memory."""

    def __init__(self, like: Tensors) -> None:
        self._shapes = dict(like.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return self._shapes

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One tensor of zeros, or some of its rows."""
        import torch

        whole = torch.zeros(()).expand(self._shapes[name])
        return whole if rows == slice(None) else whole[rows]


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
        mine, others = pairs[name]
        found = None if mine is None else (mine, here[mine]), None if others is None else (others, there[others])
        yield _row(name, *found, target, original, device)


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


def _row(
    name: str,
    here: tuple[str, tuple[int, ...]] | None,
    there: tuple[str, tuple[int, ...]] | None,
    target: Tensors,
    original: Tensors,
    device: str,
) -> TensorRow:
    """One row; `here` and `there`: name and shape in either model. What was read is let go when it is done."""
    if here is None or there is None:
        source, only, where = (target, here, "target") if there is None else (original, there, "original")
        assert only is not None, "a name is of one model at least"
        stored = _dtype(source.read(only[0], _pieces(only[1])[0]))
        both = (stored, "") if there is None else ("", stored)
        return TensorRow(name, only[1], *both, note=f"only in the {where}")
    (now, shape), (before, shape_before) = here, there
    known: dict[str, Any] = {"shape": shape}
    if shape != shape_before:
        known["dtype"] = _dtype(target.read(now, _pieces(shape)[0]))
        known["original_dtype"] = _dtype(original.read(before, _pieces(shape_before)[0]))
        note = f"shapes differ: the original's is {_shape(shape_before)}, not {_shape(shape)}"
        return TensorRow(name, **known, note=note)
    if now != before:
        known["note"] = f"a head of its own, and {before if now == name else now} in the other model"
    measures = _Measures(shape)
    for rows in _pieces(shape):
        read, read_before = target.read(now, rows), original.read(before, rows)
        known |= {"dtype": _dtype(read), "original_dtype": _dtype(read_before)}
        w, w0 = _as_numbers(read), _as_numbers(read_before)
        if w is None or w0 is None:
            note = f"{_dtype(read_before if w0 is None else read)} holds no plain numbers"
            return TensorRow(name, **known | {"note": note})
        del read, read_before
        if not (bool(w.isfinite().all()) and bool(w0.isfinite().all())):
            return TensorRow(name, **known | {"note": "holds values that are not finite"})
        measures.add(w.to(device), w0.to(device))
        del w, w0
    return TensorRow(name, **known, **measures.found())


def _pieces(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a tensor in runs of at most `_PIECE` entries, or of one row; all of a small one."""
    if len(shape) < 2 or math.prod(shape) <= _PIECE:
        return [slice(None)]
    step = max(1, _PIECE // math.prod(shape[1:]))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


class _Measures:
    """The numbers of a row, from the tensors' rows, a run of them at a time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._size = shape, math.prod(shape)
        self._matrix = len(shape) == 2 and self._size > 0
        self._tall = self._matrix and self._size > _PIECE and shape[0] >= shape[1]
        self._norm = self._original_norm = self._largest = self._step = 0.0
        self._equal = self._kept = 0
        self._change: Tensor | None = None
        self._filled = 0
        self._products: Tensor | None = None

    def add(self, w: Tensor, w0: Tensor) -> None:
        """Take in the next rows of both, as float32."""
        import torch

        change = w - w0
        self._norm = math.hypot(self._norm, float(torch.linalg.vector_norm(change, dtype=torch.float64)))
        self._original_norm = math.hypot(self._original_norm, float(torch.linalg.vector_norm(w0, dtype=torch.float64)))
        self._equal += int((change == 0).sum())
        self._largest = max(self._largest, float(change.abs().max()) if change.numel() else 0.0)
        if not self._matrix:
            return
        self._kept += int((int4_codes(w)[0] == int4_codes(w0)[0]).sum())
        self._step = max(self._step, _widest_step(change, w0))
        if self._tall:
            wide = change.double()
            product = wide.T @ wide
            self._products = product if self._products is None else self._products.add_(product)
            return
        if self._change is None:
            self._change = change if change.shape == self._shape else change.new_empty(self._shape)
        self._change[self._filled : self._filled + len(change)] = change
        self._filled += len(change)

    def found(self) -> dict[str, Any]:
        """All of them, when all rows were taken in."""
        found: dict[str, Any] = {"norm": self._norm, "original_norm": self._original_norm}
        found |= {"equal": self._equal, "largest": self._largest}
        if self._matrix:
            found |= {"int4_kept": self._kept / self._size, "int4_step": self._step}
        if self._matrix and self._largest:
            values = self._singular()
            found |= {"stable_rank": stable_rank(values), "effective_rank": effective_rank(values)}
            found |= {"first": float(values[0]), "middle": float(values.median())}
            found["second"] = float(values[1]) if len(values) > 1 else 0.0
        return found

    def _singular(self) -> Tensor:
        """Singular values of D, largest first."""
        import torch

        products, change = self._products, self._change
        if products is None:
            assert change is not None
            if self._size <= _PIECE:
                return _spectrum(change)
            products = torch.zeros(len(change), len(change), dtype=torch.float64, device=change.device)
            for columns in torch.split(change, max(1, _PIECE // len(change)), dim=1):
                products.addmm_(columns.double(), columns.double().T)
        roots: Tensor = torch.linalg.eigvalsh(products).clamp_min(0).sqrt().flip(0)
        return roots


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


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
