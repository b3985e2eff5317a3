"""Group-wise int4 (SAAP eq. 13–14, QA-LoRA arXiv 2309.14717): one scale and one float zero per group of inputs."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError
from saap.families import family_of
from saap.modeling import GroupwiseLinear, use_groupwise

LEVELS = 15  # int4


def quantize(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min–max int4 of a weight (out, in), in groups of `group_size` inputs.

    Returns codes uint8 (out, in), each 0…15, scale and zero float16 (out, ⌈in/group_size⌉): a = (max − min)/15,
    b = min, q = clip(round((w − b)/a), 0, 15), ŵ = a·q + b. (Eq. 14 prints a(q − b), which eq. 13 contradicts.)
    a and b are rounded to float16 before the codes are made, so that the codes fit what is stored. A constant group
    has scale 0. Raises SaapError when a value does not fit float16.
    """
    out, width = weight.shape
    groups = -(-width // group_size)
    # repeating the last input fills the last group without moving its minimum or maximum
    padded = F.pad(weight.detach().float()[None], (0, groups * group_size - width), mode="replicate")[0]
    grouped = padded.view(out, groups, group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = ((high - low) / LEVELS).half(), low.half()
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        raise SaapError("a weight is too large, or not a number, for group-wise int4 with float16 scales")
    a, b = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    codes = ((grouped - b) / torch.where(a > 0, a, torch.ones_like(a))).round().clamp(0, LEVELS)
    return codes.to(torch.uint8).view(out, -1)[:, :width].contiguous(), scale, zero


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 (out, in) of 0…15 → uint8 (out, ⌈in/2⌉), input 2j in the low half of byte j."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


@torch.no_grad()
def to_groupwise(model: Any, group_size: int) -> Any:
    """An int4 copy of a Llama-like model: every linear layer of every block, not the embeddings or the head.

    Raises SaapError for a family without an int4 form or an impossible group size.
    """
    if group_size < 2:
        raise SaapError(f"group_size must be at least 2, got {group_size}")
    family = family_of(model.config)
    if not family.int4:
        raise SaapError(f"group-wise int4 is not available for model family '{model.config.model_type}'")
    widths = {}
    for layer, config in enumerate(family.block_configs(model)):
        everything = {kind: list(range(count)) for kind, count in family.units(config).items()}
        widths[layer] = family.widths(config, everything)
    with torch.device("meta"):
        small: Any = family.uneven(model.config, widths)
    kept = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("model.layers.")}
    small.load_state_dict(kept, strict=False, assign=True)
    small.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    use_groupwise(small.model.layers, group_size)
    small.config.groupwise = {"bits": 4, "group_size": group_size}
    for block, source in zip(small.model.layers, family.blocks(model), strict=True):
        for name, module in source.named_modules():
            if isinstance(module, nn.Linear):
                target = block.get_submodule(name).to_empty(device=module.weight.device)
                codes, scale, zero = quantize(module.weight, group_size)
                target.codes, target.scale, target.zero = pack(codes), scale, zero
                if module.bias is not None:
                    target.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
            elif not list(module.children()):
                block.set_submodule(name, copy.deepcopy(module))
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace, in place, every GroupwiseLinear by a float32 nn.Linear of exactly the same weights; returns the model.

    For evaluation, where many tokens pass each layer and unpacking every time would only cost time.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight = nn.Parameter(module.weight(), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(torch.as_tensor(module.bias), requires_grad=False)
            model.set_submodule(name, linear)
    return model
