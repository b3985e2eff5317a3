"""The part of a mixture of experts in `saap.score`: router rows, gate and up rows, and down columns of every expert."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from saap.models.families import Experts, family_of
from saap.scoring.experts import mixtures_of, watch_experts
from saap.scoring.salience import channel_sums


class ExpertChannels:
    """Channels of the mixtures of a model, numbered from `start` on, and which of them make each group.

    A layer has E rows of the router, then for each expert 2I rows of gate and up as they are stored and I columns of
    down. structures: (layer, kind) → channels of its groups, int64 (E, 1 + 3I) and (E·I, 3).
    """

    def __init__(self, model: nn.Module, start: int) -> None:
        self.family = cast(Any, family_of(model.config))
        self.mixtures = mixtures_of(model)[1] if isinstance(self.family, Experts) else {}
        self.layers: Any = self.family.layers(model)
        self.count = start
        self.router: dict[int, slice] = {}
        self.inside: dict[int, torch.Tensor] = {}  # (E, 3I)
        self.structures: dict[tuple[int, str], torch.Tensor] = {}
        for layer, module in self.mixtures.items():
            width, experts = self.family.width(module), module.num_experts
            rows = torch.arange(self.count, self.count + experts)
            self.router[layer] = slice(self.count, self.count + experts)
            inside = self.count + experts + torch.arange(experts * 3 * width).view(experts, -1)
            self.count += experts * (1 + 3 * width)
            self.inside[layer] = inside
            both, down = inside[:, : 2 * width], inside[:, 2 * width :]
            gate, up = both.chunk(2, 1) if self.family.layout.stacked else (both[:, 0::2], both[:, 1::2])
            self.structures[layer, "expert"] = torch.cat([rows[:, None], inside], 1)
            self.structures[layer, "mlp"] = torch.stack([gate, up, down], -1).flatten(0, 1)

    @contextmanager
    def watched(self, sums: torch.Tensor, hessian: str, scale: float) -> Iterator[None]:
        """While open, a backward pass of B samples fills these channels of sums, float32 (2, B, channels).

        As `channel_sums` says; experts that get no token of a sample leave theirs as they are.
        """
        how: dict[str, Any] = {"hessian": hessian, "scale": scale}
        samples = sums.shape[1]

        def see_router(layer: int, x: torch.Tensor, delta: torch.Tensor) -> None:
            weight = self.layers[layer].get_submodule(self.family.router).weight
            x, delta = (t.reshape(samples, -1, t.shape[-1]) for t in (x, delta))
            sums[:, :, self.router[layer]] = channel_sums(weight, delta, x, 0, **how)

        def see(layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, delta: torch.Tensor) -> None:
            module, length = self.mixtures[layer], len(x) // samples
            for expert in index.unique().tolist():
                token, place = torch.where(index == expert)
                weighted = delta[token] * weights[token, place, None]
                both, entering, back = self._around_gate(module, expert, x[token], weighted)
                for sample in (token // length).unique().tolist():
                    mine = token // length == sample
                    found = torch.cat(
                        [
                            channel_sums(both, back[mine][None], x[token[mine]][None], 0, **how),
                            channel_sums(
                                self.family.down(module, expert).T.contiguous(),
                                weighted[mine][None],
                                entering[mine][None],
                                1,
                                **how,
                            ),
                        ],
                        -1,
                    )
                    sums[:, sample, self.inside[layer][expert]] = found[:, 0]

        with ExitStack() as stack:
            stack.enter_context(watch_experts(self.mixtures, see, gradients=True))
            for layer in self.mixtures:
                router = self.layers[layer].get_submodule(self.family.router)
                stack.callback(router.register_forward_hook(_on_logits(layer, see_router)).remove)
            yield

    def _around_gate(
        self, module: Any, expert: int, x: torch.Tensor, weighted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight of gate and up, (2I, H); what enters down_proj, (n, I); the gradient of gate and up, (n, 2I)."""
        with torch.no_grad():
            leaf = self.family.gate_and_up(module, expert, x)
        leaf.requires_grad_()
        with torch.enable_grad():
            entering = self.family.gated(module, leaf)
        (back,) = torch.autograd.grad(entering, leaf, weighted @ self.family.down(module, expert).T)
        both = module.gate_up_proj[expert]
        return both if self.family.layout.stacked else both.T.contiguous(), entering.detach(), back


def _on_logits(layer: int, see: Any) -> Any:
    def forward(_: nn.Module, inputs: tuple, output: tuple) -> None:
        logits = output[0]
        if logits.requires_grad:
            x = inputs[0].detach()
            logits.register_hook(lambda delta: see(layer, x, delta.detach()))

    return forward
