"""Evidence: captures on disk, found again by their content.

A block holds the rows of one batch. It is written to a temporary name and renamed, so that a killed scan leaves
whole blocks only; the next one finds them and runs what is missing. A block's name is the SHA-256 of its bytes, and
a note holds that of what it notes: one that does not match was damaged, and is set aside and computed again. This is
looked at whenever a file is read, not only when it is first found.

Blocks lie in a folder per context: model digest, dtype, device type and library versions. Nothing captured from
one model, or under one set of numerics, is ever served for another.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from audit.errors import Damaged, Incomplete, Unwritable
from audit.plan import AnyRequest, Generate, Patched, Request
from audit.quantities import Quantity
from audit.record import write_atomically
from audit.tokens import Tokens, content_key

if TYPE_CHECKING:
    from audit.weights import TensorRow

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
_MOST_IN_MEMORY = 64 * 2**20
"""Bytes of blocks that a store keeps at hand, besides the one being read."""


@dataclass(frozen=True)
class Place:
    """Where the values of one sequence and quantity lie."""

    block: Path
    first: int
    last: int
    start: int


class Store:
    """The captures of one model in one context, whose `digest` names it.

    Args:
        root: the audit's `evidence/` folder.
        context: everything the numbers depend on besides the tokens; see `context_of`.
    """

    def __init__(self, root: Path, context: Mapping[str, str]) -> None:
        digest = hashlib.sha256(json.dumps(dict(context), sort_keys=True).encode()).hexdigest()
        self.digest = digest
        self.folder = root / digest[:16]
        self.damaged: list[str] = []
        self._places: dict[tuple[str, str], Place] = {}
        self._cache: OrderedDict[Path, dict[str, Arrays]] = OrderedDict()  # arrays by quantity and key
        self._held = 0
        self._context = dict(context)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def knows(self, tokens: Tokens, quantity: Quantity) -> bool:
        """Is this quantity recorded for this sequence, from `tokens.start` on or earlier?"""
        place = self._places.get((tokens.key, quantity.name))
        return place is not None and place.start <= tokens.start

    def knows_continuation(self, prompt: tuple[int, ...], new_tokens: int, way: str = "greedy") -> bool:
        """Is the continuation of this prompt recorded? `way`: see `Generate.ways`."""
        return (content_key(prompt), f"{way}-{new_tokens}") in self._places

    def write(self, rows: Iterable[tuple[Tokens, Mapping[str, Arrays]]]) -> None:
        """Store the rows of one batch as one block: the batch is recorded as a whole or not at all."""
        members: dict[str, list[tuple[Tokens, Arrays]]] = {}
        for tokens, values in rows:
            for quantity, arrays in values.items():
                members.setdefault(quantity, []).append((tokens, arrays))
        self._write(
            {
                quantity: (
                    [(tokens.key, tokens.start, tokens.scored) for tokens, _ in pairs],
                    {key: np.concatenate([arrays[key] for _, arrays in pairs]) for key in pairs[0][1]},
                )
                for quantity, pairs in members.items()
            }
        )

    def write_continuations(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        new_tokens: int,
        ways: Sequence[str] = ("greedy",),
    ) -> None:
        """Store continuations (prompt ids, new ids) of one batch: prompt after prompt, one in each of the ways."""
        quantities = {}
        for i, way in enumerate(ways):
            index = [(content_key(prompt), 0, len(new)) for prompt, new in pairs[i :: len(ways)]]
            ids = np.concatenate([np.asarray(new, np.int64) for _, new in pairs[i :: len(ways)]])
            quantities[f"{way}-{new_tokens}"] = (index, {"ids": ids})
        self._write(quantities)

    def read(self, tokens: Tokens, quantity: str) -> Arrays:
        """Arrays over the scored tokens of one sequence. Raises KeyError if they were never captured."""
        place = self._places[tokens.key, quantity]
        skip = tokens.start - place.start
        return self._read(place, quantity, skip)

    def read_continuation(self, prompt: tuple[int, ...], new_tokens: int, way: str = "greedy") -> tuple[int, ...]:
        """New ids after a prompt."""
        name = f"{way}-{new_tokens}"
        return tuple(self._read(self._places[content_key(prompt), name], name, 0)["ids"].tolist())

    def _read(self, place: Place, quantity: str, skip: int) -> Arrays:
        block = self._cache.get(place.block)
        if block is None:
            block = {}
            for name, array in load(self._sound(place.block)).items():
                of, _, key = name.rpartition("/")
                block.setdefault(of, {})[key] = array
            self._cache[place.block] = block
            self._held += _size(block)
            while self._held > _MOST_IN_MEMORY and len(self._cache) > 1:
                self._held -= _size(self._cache.popitem(last=False)[1])
        else:
            self._cache.move_to_end(place.block)
        return {key: array[place.first + skip : place.last] for key, array in block[quantity].items()}

    def _write(self, quantities: dict[str, tuple[list[tuple[str, int, int]], Arrays]]) -> None:
        arrays = {
            f"{name}/{key}": np.ascontiguousarray(array)
            for name, (_, parts) in quantities.items()
            for key, array in parts.items()
        }
        index = {name: rows for name, (rows, _) in quantities.items()}
        # One entry: safetensors writes several in random order, and the block's name is the digest of its bytes.
        data = save(arrays, {"block": json.dumps({"context": self._context, "rows": index}, sort_keys=True)})
        path = self.folder / f"{_digest(data)}.safetensors"
        write_atomically(path, data, sync=False)
        self._place(path, index)

    def _sound(self, path: Path) -> bytes:
        """The bytes of an indexed block, if they still are what was written."""
        data = _bytes(path)
        if data is not None and _digest(data) == path.stem:
            return data
        self._set_aside(path)
        self._places = {what: place for what, place in self._places.items() if place.block != path}
        raise Damaged(f"{path}: {'gone' if data is None else 'damaged'} since it was written; scan again to replace it")

    def _index(self, path: Path) -> None:
        data = _bytes(path)
        if data is None:  # another scan that shares this folder found it damaged
            return
        rows = self._rows(data) if _digest(data) == path.stem else None
        if rows is None:
            self._set_aside(path)
        else:
            self._place(path, rows)

    def _rows(self, data: bytes) -> Mapping[str, Iterable[tuple[str, int, int]]] | None:
        """What a block says that it holds; None if it is another model's, carried here, or none of ours."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            block = json.loads(header["__metadata__"]["block"])
            return block["rows"] if block["context"] == self._context else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def _set_aside(self, path: Path) -> None:
        self.damaged.append(path.name)
        try:
            path.replace(path.with_suffix(".damaged"))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Unwritable(f"{path}: damaged, and cannot be set aside: {error.strerror}") from None

    def _place(self, path: Path, index: Mapping[str, Iterable[tuple[str, int, int]]]) -> None:
        """Note where the rows of a block lie."""
        for quantity, rows in index.items():
            first = 0
            for key, start, length in rows:
                known = self._places.get((key, quantity))
                if known is None or start < known.start:
                    self._places[key, quantity] = Place(path, first, first + length, start)
                first += length

    # --- notes ----------------------------------------------------------------------------------------

    def note(self, name: str) -> float | None:
        """A number noted about this context, e.g. its numeric noise; None if it was not."""
        try:
            return float(self.recall(name))
        except (ValueError, TypeError):  # not there, or damaged: to be measured again
            return None

    def write_note(self, name: str, value: float) -> None:
        """Note a number."""
        self.remember(name, value)

    def recall(self, name: str) -> Any:
        """What was noted about this context under a name, as JSON has it; None if nothing was, or it was damaged."""
        path = self.folder / f"{name}.json"
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            value = json.loads(data)["value"]
            if data == self._noted(name, value):
                return value
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._set_aside(path)
        return None

    def remember(self, name: str, value: Any) -> None:
        """Note anything that JSON can hold."""
        write_atomically(self.folder / f"{name}.json", self._noted(name, value), sync=False)

    def _noted(self, name: str, value: Any) -> bytes:
        """A note's file. Equal notes are equal bytes, so that any other byte is damage."""
        said = json.dumps([self.digest, name, value], sort_keys=True, allow_nan=False)
        note = {"sha256": hashlib.sha256(said.encode()).hexdigest(), "value": value}
        return json.dumps(note, sort_keys=True, allow_nan=False).encode()


def _bytes(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Incomplete(f"{path}: cannot be read: {error.strerror}") from None


def _digest(data: bytes) -> str:
    """The name of a block of these bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def _size(block: dict[str, Arrays]) -> int:
    return sum(array.nbytes for arrays in block.values() for array in arrays.values())


class Evidence:
    """What an instrument's `measure` reads: answers to its requests, by role and request name.

    Every role has its requests (in the order the instrument made them) and the store that answers them.
    """

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}
        self._requests: dict[tuple[str, str], AnyRequest] = {}
        self._texts: dict[tuple[str, str], list[str]] = {}
        self._weights: dict[tuple[str, str], list[TensorRow]] = {}
        self.noise: dict[str, float] = {}

    def register(self, role: str, store: Store, requests: Iterable[AnyRequest]) -> None:
        """Bind a role's requests to the store that holds their answers."""
        self._stores[role] = store
        for request in requests:
            known = self._requests.get((role, request.name))
            if isinstance(known, Request) and isinstance(request, Request):
                if known.sequences != request.sequences:
                    raise ValueError(f"two requests named {request.name!r} for different texts")
                # Two instruments may ask the same of the same texts; what one of them adds is added.
                both = {q.name: q for q in (*known.quantities, *request.quantities)}
                request = replace(request, quantities=tuple(both.values()), extra={**known.extra, **request.extra})
            self._requests[role, request.name] = request

    def add_texts(self, role: str, name: str, texts: list[str]) -> None:
        """Decoded continuations of a `Generate` request, prompt after prompt, each in all of its ways."""
        self._texts[role, name] = texts

    def add_weights(self, role: str, name: str, rows: list[TensorRow]) -> None:
        """The comparison that a `Weights` request asked for."""
        self._weights[role, name] = rows

    @property
    def roles(self) -> list[str]:
        """Every role that was captured, attacked ones included."""
        return list(self._stores)

    def requests(self) -> list[tuple[str, AnyRequest]]:
        """All that was asked, each with the role it was asked of."""
        return [(role, request) for (role, _), request in self._requests.items()]

    def has(self, role: str, name: str) -> bool:
        """Was this request made of this role?"""
        return (role, name) in self._requests

    def scores(self, role: str, name: str, *quantities: str) -> list[Arrays]:
        """Per requested sequence, the arrays of the named quantities (all requested ones if none is named).

        Raises:
            KeyError: the role was not asked for this request.
        """
        return list(self.iterate(role, name, *quantities))

    def iterate(self, role: str, name: str, *quantities: str) -> Iterator[Arrays]:
        """Like `scores`, one sequence at a time."""
        request = self._requests[role, name]
        assert isinstance(request, Request)
        wanted = quantities or tuple(quantity.name for quantity in request.quantities)
        store = self._stores[role]
        for tokens in request.sequences:
            values: Arrays = {}
            for quantity in wanted:
                values |= store.read(tokens, quantity)
            yield values

    def store(self, role: str) -> Store | None:
        """Where the captures of a role lie; None if it was not captured yet."""
        return self._stores.get(role)

    def patched(self, role: str, name: str) -> Iterator[Arrays]:
        """Per sequence of a `Patched` request, the arrays of its quantities, [T, 1 + sites, ...]."""
        request = self._requests[role, name]
        assert isinstance(request, Patched)
        store, source = self._stores[role], self._stores[request.source].digest
        for tokens in request.sequences:
            values: Arrays = {}
            for quantity in request.quantities:
                values |= store.read(tokens, request.kept(quantity, tokens, source).name)
            yield values

    def texts(self, role: str, name: str) -> list[str]:
        """Decoded continuations, in the order of the request's prompts; of each prompt all that were asked for."""
        return self._texts[role, name]

    def continuations(self, role: str, name: str) -> list[tuple[int, ...]]:
        """Token ids of the same continuations, in the same order."""
        request, store = self._requests[role, name], self._stores[role]
        assert isinstance(request, Generate)
        return [store.read_continuation(p, request.new_tokens, way) for p in request.prompts for way in request.ways]

    def weights(self, role: str, name: str) -> list[TensorRow]:
        """How the weight files differ from those they were compared with: a row a tensor."""
        return self._weights[role, name]

    def extra(self, role: str, name: str) -> Mapping[str, Any]:
        """What the instrument noted when it made the request."""
        request = self._requests[role, name]
        assert isinstance(request, Request)
        return request.extra

    def quantities(self, role: str, name: str) -> tuple[Quantity, ...]:
        """What was asked for at the scored tokens of a request, by whichever instruments."""
        request = self._requests[role, name]
        assert isinstance(request, Request)
        return request.quantities

    def sequences(self, role: str, name: str) -> tuple[Tokens, ...]:
        """The sequences of a request."""
        request = self._requests[role, name]
        assert isinstance(request, Request)
        return request.sequences


@contextmanager
def claimed(root: Path, digest: str) -> Iterator[None]:
    """One process at a time captures a model into the evidence folder `root`; the next finds what it wrote.

    So scans that share an original run it once, though they begin together. The lock is the system's, and goes with
    the process that holds it, however that ends. On a file system without locks both capture, which is work done
    twice and nothing worse: blocks are named by their content.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{digest[:16]}.lock").open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def context_of(digest: str, *, dtype: str, device: str) -> dict[str, str]:
    """Everything captured numbers depend on besides tokens: the address of a store."""
    import torch
    import transformers

    return {
        "model": digest,
        "dtype": dtype,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
