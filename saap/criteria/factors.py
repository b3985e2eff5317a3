"""LoRA factors trained briefly on the calibration text: what `loraprune` and `lorashear` look at."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError
from saap.models.families import Part
from saap.models.groups import group_matrices
from saap.models.offload import input_device, is_offloaded
from saap.progress import tqdm
from saap.scoring.backward import LOSS_SCALES

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-3
EPOCHS = 2
BATCH = 4  # samples a step; part of the result, so not the batch size of the machine


@dataclass(frozen=True)
class Factor:
    """W + s·B·A at one matrix of the groups: a float32 (rank, in), b float32 (out, rank) from zero, s = ALPHA/RANK."""

    layer: int
    kind: str
    part: Part
    linear: nn.Linear
    a: nn.Parameter
    b: nn.Parameter


@contextmanager
def lora_factors(model: nn.Module, seed: int) -> Iterator[list[Factor]]:
    """While open, every matrix of every group has LoRA factors beside its frozen weight; afterwards they are gone.

    Raises SaapError for a model whose weights are partly away from its device.
    """
    if is_offloaded(model):
        raise SaapError("criteria that train LoRA factors need a model whose weights are all on its device")
    generator = torch.Generator().manual_seed(seed)
    factors: list[Factor] = []
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        for layer, kind, part, linear in group_matrices(model):
            out, width = linear.weight.shape
            device = linear.weight.device
            a = nn.Parameter((torch.randn(RANK, width, generator=generator) / width**0.5).to(device))
            b = nn.Parameter(torch.zeros(out, RANK, device=device))
            factors.append(Factor(layer, kind, part, linear, a, b))
            stack.callback(linear.register_forward_hook(_adder(a, b)).remove)
        yield factors


def _adder(a: nn.Parameter, b: nn.Parameter):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + (ALPHA / RANK) * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    return hook


def training_steps(
    model: nn.Module,
    factors: list[Factor],
    tokens: torch.Tensor,
    seed: int,
    name: str,
    others: Iterable[nn.Parameter] = (),
) -> Iterator[int]:
    """Train the factors on tokens int64 (D, T); yields each step's number between its backward pass and its update.

    others: float32, get gradients at each step too.
    """
    parameters = [p for factor in factors for p in (factor.a, factor.b)]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(EPOCHS)])
    device = input_device(model)
    model.eval()
    for step, chosen in enumerate(tqdm(order.split(BATCH), desc=name, unit="step")):
        _backward(model, tokens[chosen].to(device), [*parameters, *others])
        yield step
        optimizer.step()


def _backward(model: nn.Module, ids: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """Their gradients of the mean loss; through a float16 model by way of a scaled one (`saap.scoring.backward`)."""
    for scale in LOSS_SCALES if next(model.parameters()).dtype == torch.float16 else (1.0,):
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            (scale * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())).backward()
        gradients = [parameter.grad.div_(scale) for parameter in parameters if parameter.grad is not None]
        if all(gradient.isfinite().all() for gradient in gradients):
            break


def steps_of(samples: int) -> int:
    """How many steps `training_steps` makes of so many samples."""
    return -(-samples * EPOCHS // BATCH)
