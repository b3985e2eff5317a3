"""A linear layer stored in a few bits a weight, group by group.

Needs only torch, so that a checkpoint can carry this file, which `modeling.py` imports, to people who do not have the
package.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class GroupwiseLinear(nn.Module):
    """A linear layer stored in a few bits: w[o, i] = scale[o, g]·code[o, i] + zero[o, g], g = i // group_size.

    Buffers: codes uint8 (out, ⌈in·bits/8⌉), each row a stream of bits with the lowest first (at 4 bits: input 2j in the
    low and 2j+1 in the high half of byte j); scale and zero (out, ⌈in/group_size⌉) float16; the last group may be
    shorter.
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = False, bits: int = 4) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size, self.bits = in_features, out_features, group_size, bits
        groups = -(-in_features // group_size)
        self.register_buffer("codes", torch.zeros(out_features, -(-in_features * bits // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def unpacked(self) -> torch.Tensor:
        """The codes, uint8 (out, in), each 0 … 2^bits − 1."""
        codes: torch.Tensor = self.codes  # type: ignore[assignment]
        step = self.bits if 8 % self.bits == 0 else 1  # bits that never straddle two bytes
        places, parts = torch.arange(0, 8, step, dtype=torch.uint8, device=codes.device), self.bits // step
        digits = codes.unsqueeze(-1) >> places & (2**step - 1)
        stream = digits.flatten(1)[:, : self.in_features * parts].unflatten(1, (self.in_features, parts))
        return (stream * (1 << places[:parts])).sum(-1, dtype=torch.uint8)

    def weight(self, dtype: torch.dtype = torch.float32, constant: torch.Tensor | None = None) -> torch.Tensor:
        """The weights the codes stand for, (out, in), computed in float32; `constant` is added to the zeros."""
        scale: torch.Tensor = self.scale  # type: ignore[assignment]
        zero: torch.Tensor = self.zero  # type: ignore[assignment]
        codes = self._by_group(_decode(self, torch.float32, 0))
        zero = zero.float() if constant is None else zero.float() + constant
        weight = torch.addcmul(zero.unsqueeze(-1), codes, scale.float().unsqueeze(-1))
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    def centred(self, dtype: torch.dtype, constant: torch.Tensor | None = None) -> torch.Tensor:
        """scale·(code − 2^(bits−1)), (out, in): the weights but for what is constant on a group; or plus `constant`."""
        scale: torch.Tensor = self.scale  # type: ignore[assignment]
        codes = self._by_group(_decode(self, dtype, 2 ** (self.bits - 1))).mul_(scale.to(dtype).unsqueeze(-1))
        if constant is not None:
            codes.add_(constant.unsqueeze(-1))
        return codes.flatten(1)[:, : self.in_features]

    def offset(self) -> torch.Tensor:
        """zero + 2^(bits−1)·scale, float32 (out, groups): what `centred` leaves out, small beside the weights."""
        scale: torch.Tensor = self.scale  # type: ignore[assignment]
        zero: torch.Tensor = self.zero  # type: ignore[assignment]
        return torch.add(zero.float(), scale.float(), alpha=2 ** (self.bits - 1))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) summed within each group, (…, groups)."""
        return self._by_group(x).sum(-1)

    def _by_group(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, groups, group_size), the last group filled with zeros."""
        missing = -self.in_features % self.group_size
        return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, self.group_size))

    def forward(self, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """x·Wᵀ + bias; `update`, float32 (out, groups), is added to the zeros: it is what an adapter learns.

        In float32 exactly with `weight()`. In half precision what is constant on a group is a product with the pooled
        inputs, of the sum of zeros and update in float32.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        constant = update if x.dtype == torch.float32 else self.offset() if update is None else self.offset() + update
        y = _GroupwiseMatmul.apply(x, self, constant)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _GroupwiseMatmul(torch.autograd.Function):
    """x·Wᵀ + pool(x)·Cᵀ; C, `constant` (out, groups), is what is to be added to all weights of a group, or None.

    The backward unpacks W again and adds C to it, so that training keeps pool(x) only: no float copy of the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: GroupwiseLinear, constant: torch.Tensor | None) -> torch.Tensor:
        ctx.linear = linear
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # on a GPU it would sum the pooled inputs in float32
            y = F.linear(flat, _matrix(linear, x.dtype))
            if constant is not None:
                constant = constant.to(x.dtype)
                pooled = linear.pool(flat)
                y.addmm_(pooled, constant.t())
                ctx.save_for_backward(constant, pooled if ctx.needs_input_grad[2] else None)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        constant, pooled = ctx.saved_tensors or (None, None)
        matrix, flat = _matrix(ctx.linear, grad.dtype, constant), grad.flatten(0, -2)
        back = (flat @ matrix).unflatten(0, grad.shape[:-1]) if ctx.needs_input_grad[0] else None
        return back, None, None if pooled is None else (flat.t() @ pooled).float()


def _matrix(linear: GroupwiseLinear, dtype: torch.dtype, constant: torch.Tensor | None = None) -> torch.Tensor:
    return linear.weight(constant=constant) if dtype == torch.float32 else linear.centred(dtype, constant)


def _decode(linear: GroupwiseLinear, dtype: torch.dtype, minus: int) -> torch.Tensor:
    """code − minus, (out, in): all codes of a byte in one look-up, where a byte holds whole codes.

    An exported graph has arithmetic in its place.
    """
    codes: torch.Tensor = linear.codes  # type: ignore[assignment]
    if torch.compiler.is_exporting():
        return _by_arithmetic(linear).to(dtype) - minus
    if 8 % linear.bits or dtype.itemsize * 8 // linear.bits > 8:
        return linear.unpacked().to(dtype).sub_(minus)
    table = _table(linear.bits, minus, dtype, codes.device)
    return table.index_select(0, codes.int().flatten()).view(dtype).view(len(codes), -1)[:, : linear.in_features]


def _by_arithmetic(linear: GroupwiseLinear) -> torch.Tensor:
    """The codes, int32, without what ONNX and ExecuTorch do not have: shifts, and bytes read as another dtype."""
    codes: torch.Tensor = linear.codes  # type: ignore[assignment]
    step = linear.bits if 8 % linear.bits == 0 else 1
    parts = linear.bits // step
    powers = 2 ** torch.arange(0, 8, step, dtype=torch.int32, device=codes.device)
    stream = (codes.int().unsqueeze(-1) // powers % 2**step).flatten(1)[:, : linear.in_features * parts]
    return (stream.unflatten(1, (linear.in_features, parts)) * powers[:parts]).sum(-1, dtype=torch.int32)


@lru_cache
def _table(bits: int, minus: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For each of the 256 bytes the codes in it, less `minus`, as the bytes of one integer."""
    byte = torch.arange(256, device=device).unsqueeze(-1)
    codes = (byte >> torch.arange(0, 8, bits, device=device) & (2**bits - 1)) - minus
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return codes.to(dtype).view(integers[codes.shape[1] * dtype.itemsize]).flatten()


def use_groupwise(layers: nn.Module, bits: int = 4, group_size: int | None = None, groups: int | None = None) -> None:
    """Replace every linear layer below `layers` by an empty GroupwiseLinear of its shape.

    Either group_size, the inputs that share a scale, or groups, the number of scales a row has. Raises ValueError for
    sizes that cannot be.
    """
    if not 2 <= bits <= 8 or (group_size is None) == (groups is None) or (group_size or groups or 0) < 1:
        raise ValueError(f"no group-wise form has {bits} bits, group_size {group_size} and groups {groups}")
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            size = -(-module.in_features // groups) if groups else group_size or 0
            bias = module.bias is not None
            layers.set_submodule(name, GroupwiseLinear(module.in_features, module.out_features, size, bias, bits))
