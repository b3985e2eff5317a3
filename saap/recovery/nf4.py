"""Linear layers in bitsandbytes' NF4 (QLoRA, arXiv 2305.14314). Imported only where that recipe is used."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional as F

BLOCK = 64  # numbers that share a scale


class PaddedLinear4bit(bnb.nn.Linear4bit):
    """A Linear4bit whose weight has zero columns added, up to whole blocks a row.

    With AVX512, bitsandbytes 0.50 reads a row that is 16, 32 or 48 longer than whole blocks with scales of other
    blocks: a relative error of 0.24 where NF4 has 0.09.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (0, -self.in_features % BLOCK)))


def to_nf4(linear: nn.Linear) -> bnb.nn.Linear4bit:
    """The layer in NF4 on the same device, to be trained through: its weight is frozen."""
    weight = linear.weight.detach()
    ragged = weight.device.type == "cpu" and linear.in_features % BLOCK
    kind: Any = PaddedLinear4bit if ragged else bnb.nn.Linear4bit
    four = kind(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4", device="meta")
    if ragged:
        weight = F.pad(weight, (0, -linear.in_features % BLOCK))
    codes: Any = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK)
    four.weight, four.bias = codes.to(weight.device), linear.bias
    # else a pass without gradients lays the codes out for inference: no training on, no merging after that
    four.support_avx512bf16_for_cpu = False
    made: bnb.nn.Linear4bit = four
    return made


def from_nf4(layer: Any) -> torch.Tensor:
    """The weight (out, in) that the codes of a Linear4bit stand for."""
    weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight[:, : layer.in_features]
