"""Captured arrays as Parquet: one file a request, one row a sequence.

    evidence = captured(case, Path("audit-out"))
    evidence.scores("target", "forget/answer")[0]["logprob"]      # arrays, over an answer's tokens
    write_captures(evidence, Path("captures"))                    # captures/target/forget/answer.parquet, …

Columns: `row` (place in the request), `ids` (the sequence's token ids), `start` (the first that is scored), and one for
every captured array, as a list over the scored tokens: `logprob` and `match`, `mean` and `variance`, `hidden`
([tokens][sites][width]) and so on. Names and units are those of `audit.quantities`. Of continuations: `row`, `ids` of
the prompt, and `text`, one row for every way of continuing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.evidence import Evidence
from audit.plan import Generate, Patched, Weights

if TYPE_CHECKING:
    from audit.case import Case


def captured(case: Case, out: Path) -> Evidence:
    """The evidence of a scan of this case into `out`, bound to its requests; what is missing is captured.

    `audit.case.read_case` and `Case.build` make the case of `out/case.toml` again. The model folders must be at hand:
    captures are found by their tokens, and only the tokenizer knows these.
    """
    from audit.scan import capture

    return capture(case, out / "evidence")


def write_captures(evidence: Evidence, folder: Path) -> list[Path]:
    """Write all that passes recorded, of every role; returns the files, `folder/<role>/<request>.parquet`."""
    import pyarrow
    from pyarrow import parquet

    written = []
    for role, request in evidence.requests():
        if isinstance(request, Weights):
            continue
        if isinstance(request, Generate):
            sequences = [ids for ids in request.prompts for _ in request.ways]
            columns: dict[str, Any] = {"text": pyarrow.array(evidence.texts(role, request.name), pyarrow.string())}
        else:
            sequences = [tokens.ids for tokens in request.sequences]
            patched = isinstance(request, Patched)
            rows = list((evidence.patched if patched else evidence.iterate)(role, request.name))
            columns = {"start": pyarrow.array([tokens.start for tokens in request.sequences], pyarrow.int32())}
            columns |= {key: _lists([row[key] for row in rows]) for key in (rows[0] if rows else ())}
        columns = {
            "row": pyarrow.array(range(len(sequences)), pyarrow.int64()),
            "ids": pyarrow.array(sequences, pyarrow.list_(pyarrow.int32())),
        } | columns
        path = folder / role / f"{request.name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), path)
        written.append(path)
    return written


def _lists(arrays: Sequence[NDArray[Any]]) -> Any:
    """Arrays [T, ...], each of its own length T, as one column of lists; what is behind T has a fixed size."""
    import pyarrow

    joined = np.concatenate(arrays)
    values = pyarrow.array(joined.reshape(-1))
    for size in reversed(joined.shape[1:]):
        values = pyarrow.FixedSizeListArray.from_arrays(values, size)
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), values)
