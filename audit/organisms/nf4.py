"""NF4, the 4-bit format of QLoRA, in plain torch: codes, values, and the cell of a weight.

    packed = quantize(weight)                # codes `[weights]`, absmax `[blocks]`
    dequantize(packed)                       # the weights that a 4-bit model computes with
    low, high = cells(weight)                # every weight between them has the same code

A tensor is cut, in the order of its elements, into blocks of 64. A block is divided by its largest magnitude, its
absmax, and each element becomes the code of the nearest of 16 levels. All that is stored is codes and absmax, so two
tensors with the same codes and absmax are the same 4-bit tensor, whatever they were before.

Source: Dettmers et al. 2023, arXiv 2305.14314; the levels are those of bitsandbytes.

Traps:

- bitsandbytes 0.50.2 returned wrong values on a CPU where a row's length is no multiple of the block size, though its
  codes were right. That is why this module exists.
- On a border between two cells rounding decides. `cells` stays `margin` * absmax away from borders, unless the
  weight itself is nearer. Rounding to bfloat16 moves a scaled weight w by up to 2^-7 * |w| (its own rounding and its
  block's absmax), 0.0067 at the outermost border: the default margin is more. In float32 0.001 would do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes 0 to 15 stand for, in units of absmax: unequal steps, and 0 exactly."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized tensor."""

    codes: Tensor
    """`[weights]` uint8, 0 to 15, in the order of the elements."""
    absmax: Tensor
    """`[blocks]` float32."""
    shape: torch.Size

    def same(self, other: Packed) -> bool:
        """Are both the same 4-bit tensor?"""
        return (
            self.shape == other.shape
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.absmax, other.absmax)
        )


def quantize(weight: Tensor) -> Packed:
    """Codes and absmax of a tensor. A weight exactly between two levels gets the lower one."""
    blocks = _blocks(weight)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.bucketize(_scaled(blocks, absmax), _borders()).to(torch.uint8)
    return Packed(codes.flatten()[: weight.numel()], absmax, weight.shape)


def dequantize(packed: Packed) -> Tensor:
    """The float32 tensor that the codes stand for."""
    values = torch.tensor(LEVELS)[packed.codes.long()]
    return (values * packed.absmax.repeat_interleave(BLOCK)[: len(values)]).view(packed.shape)


def cells(weight: Tensor, *, margin: float = 0.007) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that each weight may take and keep its code, its block keeping its absmax.

    The elements that are their block's absmax may not move at all. `margin`, in units of absmax, keeps the others
    from the borders; the weight itself is always allowed.
    """
    blocks = _blocks(weight)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.bucketize(_scaled(blocks, absmax[:, 0]), _borders())
    edges = torch.cat([torch.tensor([-1.0]), _borders(), torch.tensor([1.0])])
    low = torch.minimum((edges[codes] + margin) * absmax, blocks)
    high = torch.maximum((edges[codes + 1] - margin) * absmax, blocks)
    pinned = blocks.abs() == absmax
    low, high = torch.where(pinned, blocks, low), torch.where(pinned, blocks, high)
    count = weight.numel()
    return low.flatten()[:count].view_as(weight), high.flatten()[:count].view_as(weight)


def _borders() -> Tensor:
    """The 15 midpoints between neighbouring levels."""
    levels = torch.tensor(LEVELS)
    return (levels[1:] + levels[:-1]) / 2


def _blocks(weight: Tensor) -> Tensor:
    """Cut into `[blocks, BLOCK]`, the last one filled up with zeros."""
    flat = weight.detach().float().flatten()
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _scaled(blocks: Tensor, absmax: Tensor) -> Tensor:
    return blocks / torch.where(absmax == 0, torch.ones_like(absmax), absmax)[:, None]
