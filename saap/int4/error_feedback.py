"""Codes that make up for each other's rounding: GPTQ (Frantar et al., arXiv 2210.17323), with a search of the grids."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from saap.errors import SaapError
from saap.models.products import FastLinears, product
from saap.models.stream import Stream

DAMPING = 0.01  # of the mean diagonal, as in GPTQ
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range, the best by squared error is taken
BATCH = 8  # sequences at once; no part of the result

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def quantize_with_feedback(weight: torch.Tensor, gram: torch.Tensor, group_size: int, bits: int = 4) -> Codes:
    """Codes of a weight (out, in) whose product with its inputs x_t stays near: Σ_t ‖(W − Ŵ) x_t‖² is to be small.

    Input after input is rounded, and the inputs after it take over what that leaves (GPTQ). The grid of a quantisation
    group is set when its turn comes: the one of `SHRINK` with the smallest Σ_i G_ii (w_i − ŵ_i)².

    Args:
        gram: float (in, in), G = Σ_t x_t x_tᵀ.

    Returns codes uint8 (out, in), scale and zero float16 (out, ⌈in/group_size⌉), in the form of `quantize`.
    Raises SaapError when a value does not fit float16 or is not finite.
    """
    rows, width = weight.shape
    left, gram = weight.detach().float().clone(), gram.double().clone()
    if not torch.isfinite(gram).all():
        raise SaapError("an activation is not finite: load the model in float32, if its weights are finite")
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, width, group_size):
        part = slice(start, min(start + group_size, width))
        scale, zero = _grid(left[:, part], diagonal[part].float(), bits)
        scales.append(scale)
        zeros.append(zero)
        a, b = scale.float(), zero.float()
        block, inside = left[:, part], upper[part, part]
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            found = _rounded(block[:, i], a, b, bits)
            codes[:, start + i] = found.to(torch.uint8)
            errors[:, i] = (block[:, i] - torch.addcmul(b, a, found)) / inside[i, i]
            block[:, i:] -= errors[:, i, None] * inside[i, i:]
        left[:, part.stop :] -= errors @ upper[part, part.stop :]
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def _rounded(values: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values - b) / torch.where(a > 0, a, torch.ones_like(a))).round_().clamp_(0, 2**bits - 1)


def _grid(block: torch.Tensor, weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, float16 (out,), of the inputs of one quantisation group."""
    low, high = block.amin(1), block.amax(1)
    if not torch.isfinite(torch.stack([low, (high - low) / (2**bits - 1)]).half()).all():
        raise SaapError("a weight is too large, or not a number, for group-wise codes with float16 scales")
    best = torch.full_like(low, torch.inf)
    scale, zero = (torch.empty_like(low, dtype=torch.float16) for _ in range(2))
    for share in SHRINK:
        middle = (1 - share) / 2 * (high - low)
        a, b = ((high - low - 2 * middle) / (2**bits - 1)).half(), (low + middle).half()
        wide_a, wide_b = a.float()[:, None], b.float()[:, None]
        error = (block - torch.addcmul(wide_b, wide_a, _rounded(block, wide_a, wide_b, bits))).square() @ weights
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, a, scale), torch.where(better, b, zero)
    return scale, zero


class Feedback:
    """The codes of a model's layers, one layer after another, each on inputs behind the codes before it."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokens: torch.Tensor, bits: int) -> None:
        """tokens: int64 (D, T)."""
        self.stream, self.bits = Stream(model, tokens, BATCH), bits

    @torch.no_grad()
    def layer(self, number: int, empty: nn.Module) -> dict[str, Codes]:
        """path in the layer → codes, scale and zero, of its linear layers. Layers are asked for in order, once.

        empty: the layer that the codes are for; its group sizes are taken.
        """
        layer = self.stream.layers[number]
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        sizes: dict[str, Any] = {name: empty.get_submodule(name).group_size for name in linears}
        grams = self._grams(number, linears)
        found = {
            name: quantize_with_feedback(m.weight, grams[name], sizes[name], self.bits) for name, m in linears.items()
        }
        floats = {name: module.weight for name, module in linears.items()}
        for name, module in linears.items():
            values = _values(*found[name], sizes[name])
            module.weight = nn.Parameter(values.to(module.weight.dtype), requires_grad=False)
        with FastLinears():
            self.stream.states = [seen.out for seen in self.stream.through(number)]
        for name, module in linears.items():
            module.weight = floats[name]
        return found

    def _grams(self, number: int, linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Σ x xᵀ of the inputs of each linear layer, float32 (in, in); those with the same inputs share one."""
        grams: dict[str, torch.Tensor] = {}
        last: list[Any] = [None, ""]  # the inputs that came last, and whose they were

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                if inputs[0] is last[0]:
                    grams[name] = grams[last[1]]
                    return
                last[:] = inputs[0], name
                x = inputs[0].flatten(0, -2).float().T
                grams[name] = product(x, x).add_(grams.get(name, 0.0))

            return hook

        with FastLinears(), ExitStack() as stack:
            for name, module in linears.items():
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
            for _ in self.stream.through(number):
                pass
        return grams


def _values(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int) -> torch.Tensor:
    """The weights that codes stand for, float32 (out, in)."""
    width = codes.shape[1]
    a, b = (t.float().repeat_interleave(size, 1)[:, :width] for t in (scale, zero))
    return torch.addcmul(b, a, codes.float())
