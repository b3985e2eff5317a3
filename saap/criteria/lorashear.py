"""LoRAShear (Chen et al., arXiv 2310.18356): groups are removed bit by bit while LoRA factors make up for them."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from saap.errors import not_finite
from saap.models.groups import Groups, discover
from saap.scoring.statistics import Structure, output_matrices

from .factors import LEARNING_RATE, lora_factors, steps_of, training_steps

PERIODS = 4
SHARE = 0.7  # of all prunable parameters, taken out by the end: orders the groups for every ratio below
DECAY = 0.9


def lorashear(model: nn.Module, tokens: torch.Tensor, seed: int) -> np.ndarray:
    """In each period the least salient groups become redundant and are driven to zero; the first to reach it rank
    lowest.

    Published: the idea of LHSPG, saliency from LoRA training, progressive periods, redundant groups shrunk and
    projected to zero when a step would leave their half-space, knowledge moving to the rest meanwhile. Not published:
    the whole pipeline (knowledge-distribution analysis, schedules, weights of the saliency). Our reading: each group
    has a gate z on the inputs of its output matrix; saliency is a moving average of |z·∂L/∂z| divided by the group's
    parameters; a redundant gate takes its gradient step, shrinks linearly over the period and is set to zero when its
    sign would change; order by period, within it by saliency; one global order, layers protected by the plan alone.
    """
    groups = discover(model)
    size = [len(index) for *_, index in groups.structures()]
    z = np.ones(len(groups), np.float32)
    saliency, order = np.zeros(len(groups)), np.empty(0, np.int64)  # order: the redundant groups, first to go first
    sizes = zip(_structures(groups), size, strict=True)
    gates = {structure: nn.Parameter(torch.ones(count)) for structure, count in sizes}
    length = max(1, steps_of(len(tokens)) // (PERIODS + 1))  # nothing is removed in the first stretch
    with lora_factors(model, seed) as factors, ExitStack() as stack:
        for layer, kind, part, linear in output_matrices(model):
            gates[layer, kind].data = gates[layer, kind].data.to(linear.weight.device)
            stack.callback(linear.register_forward_pre_hook(_gate(gates[layer, kind], part.width)).remove)
        for step in training_steps(model, factors, tokens, seed, "lorashear", gates.values()):
            slope = np.concatenate([_taken_gradient(gate) for gate in gates.values()])
            if not np.isfinite(slope).all():
                raise not_finite("the gradient of LoRAShear's gates", model)
            saliency = DECAY * saliency + (1 - DECAY) * np.abs(z * slope) / groups.parameters
            period, begins = step // length, step % length == 0
            if begins and 0 < period <= PERIODS:
                z[order] = 0.0
                order = _longer(order, saliency, groups, SHARE * period / PERIODS)
            going = order[z[order] > 0]
            z[going] = np.maximum(z[going] - LEARNING_RATE * slope[going] - 1.0 / length, 0.0)
            for gate, values in zip(gates.values(), np.split(z, np.cumsum(size)[:-1]), strict=True):
                gate.data.copy_(torch.from_numpy(values))
    score = np.empty(len(groups))
    score[_longer(order, saliency, groups, 1.0)] = np.arange(len(groups))
    return score


def _longer(order: np.ndarray, saliency: np.ndarray, groups: Groups, share: float) -> np.ndarray:
    """order, continued with the least salient of the other groups up to this share of all parameters."""
    rest = np.setdiff1d(np.arange(len(groups)), order)
    rest = rest[np.argsort(saliency[rest], kind="stable")]
    every = np.concatenate([order, rest])
    return every[np.cumsum(groups.parameters[every]) <= share * groups.parameters.sum()]


def _structures(groups: Groups) -> list[Structure]:
    return [(layer, kind) for layer, kind, _ in groups.structures()]


def _taken_gradient(gate: nn.Parameter) -> np.ndarray:
    assert gate.grad is not None
    return gate.grad.cpu().numpy()


def _gate(gate: nn.Parameter, width: int) -> Callable[[nn.Module, tuple], tuple]:
    return lambda _, inputs: (inputs[0] * gate.repeat_interleave(width).to(inputs[0].dtype),)
