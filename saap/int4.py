"""Inference from int4 codes with PyTorch's own CPU kernel."""

import torch
from torch import nn

from saap.modeling import GroupwiseLinear


class Int4Linear(nn.Module):
    """A GroupwiseLinear repacked for `aten::_weight_int4pack_mm_for_cpu`; activations in bfloat16.

    The kernel computes w = a·(q − 8) + z, so z = b + 8a. Needs a group_size of 32, 64, 128 or 256 that divides the
    inputs, and outputs divisible by 16: see `fits`.
    """

    def __init__(self, linear: GroupwiseLinear) -> None:
        super().__init__()
        self.group_size, self.bias = linear.group_size, linear.bias
        scale, zero = (getattr(linear, name).float() for name in ("scale", "zero"))
        pairs = torch.stack((scale, zero + 8 * scale), -1).transpose(0, 1).contiguous()
        self.register_buffer("scales_and_zeros", pairs.bfloat16())
        codes = linear.unpacked().int()
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))

    @staticmethod
    def fits(linear: GroupwiseLinear) -> bool:
        return (
            linear.group_size in (32, 64, 128, 256)
            and linear.in_features % linear.group_size == 0
            and linear.out_features % 16 == 0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group_size, self.scales_and_zeros)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def use_int4_kernels(model: nn.Module) -> int:
    """Replace, in place, every GroupwiseLinear that fits by an Int4Linear. Returns how many were left as they are."""
    left = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            if Int4Linear.fits(module):
                model.set_submodule(name, Int4Linear(module))
            else:
                left += 1
    return left
