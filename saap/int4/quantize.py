"""Group-wise int4 (SAAP eq. 13–14, QA-LoRA arXiv 2309.14717): one scale and one float zero per group of inputs."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError
from saap.int4.error_feedback import Feedback
from saap.models.checkpoint import complete
from saap.models.families import family_of
from saap.models.modeling_groupwise import GroupwiseLinear, use_groupwise


def quantize(weight: torch.Tensor, group_size: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min–max quantisation of a weight (out, in), in groups of `group_size` inputs.

    Returns codes uint8 (out, in), each 0 … n = 2^bits − 1, scale and zero float16 (out, ⌈in/group_size⌉):
    a = (max − min)/n, b = min, q = clip(round((w − b)/a), 0, n), ŵ = a·q + b. (Eq. 14 prints a(q − b), which eq. 13
    contradicts.)
    a and b are rounded to float16 before the codes are made, so that the codes fit what is stored. A constant group
    has scale 0. Raises SaapError when a value does not fit float16.
    """
    levels = 2**bits - 1
    out, width = weight.shape
    groups = -(-width // group_size)
    # repeating the last input fills the last group without moving its minimum or maximum
    padded = F.pad(weight.detach().float()[None], (0, groups * group_size - width), mode="replicate")[0]
    grouped = padded.view(out, groups, group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = ((high - low) / levels).half(), low.half()
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        raise SaapError("a weight is too large, or not a number, for group-wise codes with float16 scales")
    a, b = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    codes = ((grouped - b) / torch.where(a > 0, a, torch.ones_like(a))).round().clamp(0, levels)
    return codes.to(torch.uint8).view(out, -1)[:, :width].contiguous(), scale, zero


def pack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """uint8 (out, in) of 0 … 2^bits − 1 → uint8 (out, ⌈in·bits/8⌉): the bits of a row in a stream, the lowest first.

    At 4 bits, input 2j is the low and 2j+1 the high half of byte j.
    """
    step = bits if 8 % bits == 0 else 1  # bits that never straddle two bytes
    places = torch.arange(0, 8, step, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> places[: bits // step] & (2**step - 1)).flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % len(places))).unflatten(1, (-1, len(places)))
    return (stream << places).sum(-1, dtype=torch.uint8)


@torch.no_grad()
def to_groupwise(
    model: Any,
    group_size: int | None = 32,
    *,
    bits: int = 4,
    groups: int | None = None,
    tokens: torch.Tensor | None = None,
    consume: bool = False,
) -> Any:
    """A copy of a Llama-like model in codes of `bits` bits: every linear layer of its decoder layers.

    Embeddings and head stay floats. group_size: inputs that share a scale and a zero. groups, given instead: how many
    quantisation groups a row has, whatever its width. tokens, int64 (D, T): text on whose inputs the codes make up for
    each other's rounding (`quantize_with_feedback`); without it each weight is rounded to the nearest code. consume:
    free the weights of `model` as they are quantised, so that memory never holds both. Raises SaapError for a family
    without such a form, or for impossible sizes.
    """
    if not 2 <= bits <= 8:
        raise SaapError(f"bits must be 2 to 8, got {bits}")
    if (group_size is None) == (groups is None):
        raise SaapError("give either group_size or groups, not both")
    if group_size is not None and group_size < 2:
        raise SaapError(f"group_size must be at least 2, got {group_size}")
    if groups is not None and groups < 1:
        raise SaapError(f"groups must be at least 1, got {groups}")
    family = family_of(model.config)
    if not family.int4:
        raise SaapError(f"group-wise int4 is not available for model family '{model.config.model_type}'")
    widths = {}
    for layer, config in enumerate(family.layer_configs(model)):
        everything = {kind: list(range(count)) for kind, count in family.units(config).items()}
        widths[layer] = family.widths(config, everything)
    with torch.device("meta"):
        small: Any = family.uneven(model.config, widths)
    kept = {n: t if consume else t.clone() for n, t in model.state_dict().items() if not n.startswith("model.layers.")}
    small.load_state_dict(kept, strict=False, assign=True)
    form: dict[str, Any] = {"bits": bits, **({"group_size": group_size} if groups is None else {"groups": groups})}
    use_groupwise(small.model.layers, **form)
    small.config.groupwise = form
    feedback = None if tokens is None else Feedback(model, tokens, bits)
    for number, (layer, source) in enumerate(zip(small.model.layers, family.layers(model), strict=True)):
        found = {} if feedback is None else feedback.layer(number, layer)
        for name, module in source.named_modules():
            if isinstance(module, nn.Linear):
                target: Any = layer.get_submodule(name).to_empty(device=module.weight.device)
                codes, scale, zero = found.get(name) or quantize(module.weight, target.group_size, bits)
                target.codes, target.scale, target.zero = pack(codes, bits), scale, zero
                if consume:
                    module.weight = None  # type: ignore[assignment]
                if module.bias is not None:
                    target.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
            elif not list(module.children()):
                layer.set_submodule(name, copy.deepcopy(module))
            else:  # what a layer of linear attention holds beside its matrices
                for own, parameter in module.named_parameters(recurse=False):
                    layer.get_submodule(name).register_parameter(own, copy.deepcopy(parameter))
    return complete(small, model)


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace, in place, every GroupwiseLinear by an nn.Linear of the same weights; returns the model.

    They take the dtype of the model's other weights; in float32 they are exactly those the codes stand for.
    For evaluation, where many tokens pass each layer and unpacking every time would only cost time.
    """
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight = nn.Parameter(module.weight(dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(torch.as_tensor(module.bias), requires_grad=False)
            model.set_submodule(name, linear)
    return model
