"""The plain way, to compare with: one text at a time through a Hugging Face model, no cache, no batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from audit.capture import Engine
from audit.plan import Request, merge
from audit.quantities import Quantity
from audit.target import Target
from audit.tokens import Tokens

Rows = dict[Tokens, dict[str, Any]]


def one_by_one(model: Any, sequences: Iterable[Tokens], *, moments: bool = True) -> Rows:
    """Log-probability and match of the scored tokens; with `moments`, mean and variance over the vocabulary."""
    rows: Rows = {}
    with torch.inference_mode():
        for text in sequences:
            ids = torch.tensor([text.ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, text.start - 1 : -1].float()
            scored = ids[0, text.start :]
            logprobs = logits.log_softmax(-1)
            row = {
                "logprob": logprobs.gather(1, scored[:, None])[:, 0],
                "match": logits.argmax(-1) == scored,
            }
            if moments:
                probabilities = logprobs.exp()
                mean = (probabilities * logprobs).sum(-1)
                row |= {"mean": mean, "variance": (probabilities * logprobs.square()).sum(-1) - mean.square()}
            rows[text] = {key: value.cpu().numpy() for key, value in row.items()}
    return rows


def by_engine(
    target: Target, sequences: Sequence[Tokens], quantities: tuple[Quantity, ...], *, share: bool = True
) -> Rows:
    """The same through the engine, planning included."""
    engine = Engine(target, share=share)
    batches = engine.batches(merge([Request("benchmark", tuple(sequences), quantities)]))
    return {
        row.tokens: {key: array for arrays in row.values.values() for key, array in arrays.items()}
        for batch in batches
        for row in engine.run(batch)
    }


def differences(a: Rows, b: Rows) -> dict[str, float]:
    """Largest absolute difference by quantity, over the scored tokens of all sequences; both must hold the same."""
    if a.keys() != b.keys():
        raise AssertionError("the two sides hold different sequences")
    worst: dict[str, float] = {}
    for tokens, values in a.items():
        for key, array in values.items():
            other = b[tokens][key]
            if array.shape != other.shape:
                raise AssertionError(f"{key}: shapes {array.shape} and {other.shape}")
            difference = np.abs(array.astype(np.float64) - other.astype(np.float64)).max()
            worst[key] = max(worst.get(key, 0.0), float(difference))
    return worst


def in_words(worst: dict[str, float]) -> str:
    """Largest differences: `max difference logprob 1e-06, …`."""
    return "max difference " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
