"""How large a model is: parameters, bytes as stored, multiply-accumulates."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from saap.models.families import Experts, family_of
from saap.models.groups import layer_parts
from saap.models.modeling_groupwise import GroupwiseLinear


@dataclass(frozen=True)
class Size:
    """Logical parameters, true bytes and multiply-accumulates of a model.

    active: the parameters one token passes: all, but of the experts of a layer only as many as the router picks.
    """

    parameters: int
    weight_bytes: int
    dtype: str
    linear_macs: int
    attention_width: int
    active: int

    def macs_per_token(self, context: int) -> int:
        """Of one new token: every linear layer and the head once; scores and values over `context` positions."""
        return self.linear_macs + 2 * context * self.attention_width


def size_of(model: nn.Module) -> Size:
    """Sizes of a model as loaded, before any layer is repacked for speed.

    An int4 weight counts as one parameter; its scales and zeros count as bytes, not as parameters.
    """
    parameters = {id(p): p for p in model.parameters()}
    buffers = {id(b): b for n, b in model.named_buffers() if not n.endswith("inv_freq")}
    count = sum(p.numel() for p in parameters.values())
    macs = model.get_input_embeddings().weight.numel()  # type: ignore[operator]  # the head has the embedding's shape
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for module in model.modules():
        if isinstance(module, GroupwiseLinear):
            count += module.in_features * module.out_features
            macs += module.in_features * module.out_features
            dtype = "int4"
        elif isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
            macs += module.weight.numel()
    width = sum(
        linear.in_features
        for module in layer_parts(model)
        for part, linear in module.get("attention", [])
        if part.axis == 1
    )
    if not width:  # of a hybrid, whose attention no group holds
        outputs = [module for name, module in model.named_modules() if name.endswith("self_attn.o_proj")]
        width = sum(linear.in_features for linear in outputs if isinstance(linear, nn.Linear | GroupwiseLinear))
    idle = 0
    family = family_of(model.config)
    for layer, experts in family.mixtures(model).items() if isinstance(family, Experts) else ():
        router: Any = family.layers(model)[layer].get_submodule(family.router)  # type: ignore[attr-defined]
        one = sum(parameter[0].numel() for parameter in experts.parameters())
        idle += (experts.num_experts - router.top_k) * one
        macs += router.weight.numel() + router.top_k * 3 * experts.down_proj[0].numel()
    stored = [*parameters.values(), *buffers.values()]
    return Size(count, sum(t.numel() * t.element_size() for t in stored), dtype, macs, width, count - idle)
