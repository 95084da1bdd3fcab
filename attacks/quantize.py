"""Quantization: does rounding the weights to few bits undo the unlearning?

What is measured: every weight matrix but embeddings and output head is rounded, and the forget facts are asked again.
An update smaller than the width of a quantization cell is rounded away: the 4-bit model is then the original's.

    int8, int4       q = round(w / s), s = max|w| / 127 or / 7 in each output channel;  w' = s q
    int4-block       the same with s for every 64 weights
    NF4, FP4         nearest of 16 levels, in units of the largest magnitude of every 64 weights
    Q8_0, Q4_0       as llama.cpp stores them: 8 or 4 bits and a 16-bit scale for every 32 weights of a row

Source: Zhang et al. 2024 (arXiv 2410.16454): 4-bit quantization restores what unlearning of small norm hid, 8-bit does
not; NF4 and FP4: Dettmers et al. 2023 (arXiv 2305.14314), the levels of bitsandbytes, in plain torch.

Traps:

- *Only the weights are rounded*: what is published of GPTQ and AWQ rounds with calibration data, which this does not.
- *A difference within noise*: 4-bit rounding costs some of everything; the never-taught and the retain rows say how
  much.
- *llama.cpp's K formats* (Q4_K) are chosen by a search that the gguf package reads but does not write. They are finer
  than Q4_0, and a change that Q4_0 keeps is kept by them or not: their silence is not known from its.
- *Most unlearning does not come back*: an update whose largest change exceeds a cell survives. `weights` tells the
  share of weights whose int4 code is the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attacks.alteration import Alteration, Altering
from audit.case import Case
from audit.contrast import Statistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from audit.opened import OpenModel

__all__ = ["Quantize", "quantize", "round_channels", "round_levels"]

_SOURCE = "Zhang et al. 2024, arXiv 2410.16454"
BLOCK = 64
_FP4 = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)


def round_channels(weight: Tensor, bits: int, block: int | None = None) -> Tensor:
    """A weight [out, …] rounded to integers of so many bits, symmetric, one scale a row or `block` of its weights."""
    from torch.nn.functional import pad

    if bits < 2 or not weight.numel():
        raise ValueError(f"bits is {bits}, weight of shape {tuple(weight.shape)}: 2 bits and one entry at least")
    rows = weight.detach().float().flatten(1)
    width = rows.shape[1]
    if block is not None:
        rows = pad(rows, (0, -width % block)).view(rows.shape[0], -1, block)
    scale = rows.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (rows / scale.where(scale > 0, scale.new_ones(()))).round() * scale
    kept: Tensor = rounded.flatten(1)[:, :width].reshape(weight.shape).to(weight.dtype)
    return kept


def round_levels(weight: Tensor, levels: tuple[float, ...], block: int = BLOCK) -> Tensor:
    """A weight [out, …] rounded to the nearest of some levels from -1 to 1, in units of each block's magnitude.

    Blocks are cut in the order of the elements, over rows, as bitsandbytes cuts them.
    """
    import torch
    from torch.nn.functional import pad

    if block < 1 or len(levels) < 2 or list(levels) != sorted(levels):
        raise ValueError(f"levels must ascend, two at least, and block be positive; got {levels} and {block}")
    flat = weight.detach().float().flatten()
    blocks = pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(levels, device=flat.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize((blocks / largest.where(largest > 0, largest.new_ones(()))).contiguous(), borders)
    return (values[codes] * largest).flatten()[: len(flat)].view(weight.shape).to(weight.dtype)


def round_gguf(weight: Tensor, form: str) -> Tensor:
    """A weight [out, …] as a GGUF file of this form (`Q8_0`, `Q4_0`, …) gives it back, by the gguf package's own code.

    Rows that the form's blocks do not divide stay as they are, for llama.cpp too would store them otherwise.

    Raises:
        KeyError: no such form.
        NotImplementedError: one that the package reads and does not write.
    """
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[form]
    rows = weight.detach().float().flatten(1)
    if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:
        return weight
    stored = quants.dequantize(quants.quantize(rows.cpu().numpy(), kind), kind)
    return torch.from_numpy(stored).view(weight.shape).to(weight)


def quantize(
    model: torch.nn.Module, scheme: str | Callable[[Tensor], Tensor], head: torch.nn.Module | None = None
) -> None:
    """Round every matrix of a model in place, output channels first; embeddings and output head stay.

    Args:
        model: of PyTorch, on any device.
        scheme: `int8`, `int4`, `int4-block`, `NF4`, `FP4`, `Q8_0`, `Q4_0`, or from a weight [out, …] to the rounded.
        head: what stays, if the model is no Hugging Face one that names its output embeddings.

    Raises:
        ValueError: no such scheme.
    """
    import torch

    from audit.opened import matrices

    if isinstance(scheme, str) and scheme not in _schemes():
        raise ValueError(f"scheme is {scheme!r}: one of {', '.join(_schemes())}, or a function, is needed")
    rounded = _schemes()[scheme] if isinstance(scheme, str) else scheme
    with torch.no_grad():
        for weight, transposed in matrices(model, head):
            weight.copy_(rounded(weight.T).T if transposed else rounded(weight))


def _schemes() -> dict[str, Callable[[Tensor], Tensor]]:
    from audit.organisms.nf4 import LEVELS

    fp4 = tuple(sorted({*_FP4, *(-level for level in _FP4)}))
    return {
        "int8": lambda weight: round_channels(weight, 8),
        "int4": lambda weight: round_channels(weight, 4),
        "int4-block": lambda weight: round_channels(weight, 4, BLOCK),
        "NF4": lambda weight: round_levels(weight, LEVELS),
        "FP4": lambda weight: round_levels(weight, fp4),
        "Q8_0": lambda weight: round_gguf(weight, "Q8_0"),
        "Q4_0": lambda weight: round_gguf(weight, "Q4_0"),
    }


class Quantize(Altering):
    """Does rounding to few bits bring forgotten facts back?"""

    name = "quantize"
    title = "Does it come back when the weights are rounded?"
    axis = "scheme"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "quantization: right answers preferred after rounding the weights", "accuracy",
        "rounding brings forgotten facts back", (0.0, 1.0), 0.15, _SOURCE,
    )  # fmt: skip

    def alterations(self, case: Case, target: OpenModel) -> list[Alteration]:  # noqa: ARG002
        """Int8, int4 and NF4 at quick budget, five at standard, llama.cpp's too at thorough."""
        fewer = {"quick": ("int8", "int4", "NF4"), "standard": ("int8", "int4", "int4-block", "NF4", "FP4")}
        wanted = fewer.get(case.options.budget.value, tuple(_schemes()))
        return [Alteration(name, partial(_apply, scheme=name), f"{name}/1") for name in wanted]


def _apply(target: OpenModel, scheme: str) -> None:
    quantize(target.model, scheme, target.output_head)
