"""Inference from int4 codes with PyTorch's own kernels."""

import torch
from torch import nn

from saap.models.modeling_groupwise import GroupwiseLinear

GROUP_SIZES = (32, 64, 128, 256)


class Int4Linear(nn.Module):
    """A 4-bit GroupwiseLinear repacked for `aten::_weight_int4pack_mm` (GPU) or `…_for_cpu`; activations in bfloat16.

    The kernels compute w = a·(q − 8) + z, so z = b + 8a. See `fits` for what they can run.
    """

    def __init__(self, linear: GroupwiseLinear) -> None:
        super().__init__()
        self.group_size, self.bias = linear.group_size, linear.bias
        scale: torch.Tensor = linear.scale  # type: ignore[assignment]
        pairs = torch.stack((scale.float(), linear.offset()), -1).transpose(0, 1).contiguous()
        self.register_buffer("scales_and_zeros", pairs.bfloat16())
        if scale.is_cuda:
            codes: torch.Tensor = linear.codes  # type: ignore[assignment]
            tiles = next(t for t in (8, 4, 2) if linear.in_features % (16 * t) == 0)  # of 16 inputs, read together
            swapped = codes << 4 | codes >> 4  # this one wants the even input in the high half of a byte
            packed = torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.unpacked().int(), 1)
        self.register_buffer("packed", packed)

    @staticmethod
    def fits(linear: GroupwiseLinear) -> bool:
        """4 bits, groups of 32, 64, 128 or 256 that divide the inputs; outputs in 16s on a CPU, 8s on a GPU (sm80)."""
        scale: torch.Tensor = linear.scale  # type: ignore[assignment]
        kind = scale.device.type
        rows = {"cpu": 16, "cuda": 8}.get(kind)
        return (
            rows is not None
            and linear.bits == 4
            and linear.group_size in GROUP_SIZES
            and linear.in_features % linear.group_size == 0
            and linear.out_features % rows == 0
            and (kind == "cpu" or torch.cuda.get_device_capability(scale.device) >= (8, 0))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(flat, self.packed, self.group_size, self.scales_and_zeros)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def use_int4_kernels(model: nn.Module) -> int:
    """Replace, in place, every GroupwiseLinear that fits by an Int4Linear. Returns how many were left as they are.

    Those compute from their codes too, by `GroupwiseLinear.forward`, only slower.
    """
    left = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            if Int4Linear.fits(module):
                model.set_submodule(name, Int4Linear(module))
            else:
                left += 1
    return left
