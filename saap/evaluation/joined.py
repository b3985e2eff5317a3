"""The small kernels of a decoding step joined by torch.compile, as serving engines join them."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from saap.models.families import family_of


@contextmanager
def joined_kernels(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """While open, the layers' RMS norms, rotary embeddings and MLPs run compiled, one kernel in place of up to ten.

    A layer is not compiled as a whole: its place in the cache is part of its code, so each would be compiled anew. The
    results differ from the plain ones in rounding only. What is captured in a CUDA graph stays so after the end.
    """
    layers = family_of(model.config).layers(model)
    kinds = {type(module) for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024))

        def compiled(place: Any, name: str) -> None:
            plain = getattr(place, name)
            stack.enter_context(patch.object(place, name, torch.compile(plain, dynamic=False, backend=backend)))

        for kind in kinds:
            if kind.__name__.endswith("RMSNorm") or _is_mlp(kind, layers):
                compiled(kind, "forward")
            elif kind.__name__.endswith("Attention"):
                source = sys.modules[kind.__module__]
                if hasattr(source, "apply_rotary_pos_emb"):
                    compiled(source, "apply_rotary_pos_emb")
        yield


def _is_mlp(kind: type, layers: nn.ModuleList) -> bool:
    return any(type(m) is kind and hasattr(m, "down_proj") and hasattr(m, "act_fn") for m in layers[0].modules())
