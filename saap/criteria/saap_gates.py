"""saap_gates: gates of coupled groups, learned under the budget towards the dense model's distribution. Our own."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError, not_finite
from saap.models.groups import Groups, discover
from saap.models.lean import lean
from saap.models.logits import logits_of
from saap.models.offload import input_device, is_offloaded
from saap.models.products import FastLinears
from saap.progress import tqdm
from saap.pruning.plan import PROTECTED, bundled, protected_groups, select
from saap.scoring.backward import LOSS_SCALES, frozen
from saap.scoring.statistics import output_matrices

STEPS = 120
BATCH = 4  # sequences a step; part of the result, so not the batch size of the machine
LEARNING_RATE = 0.02  # of Adam, falling linearly to nothing
BETAS, EPSILON = (0.9, 0.999), 1e-8
STEEPNESS = 4.0  # of the start: the gates' logits go over so wide a range
AVERAGED = 0.5  # share of the steps, the last ones, that the result is the mean of
LOGITS = 1 << 24  # at a time: 64 MB of float32


def saap_gates(
    model: nn.Module,
    fisher: np.ndarray,
    tokens: torch.Tensor,
    ratio: float,
    seed: int,
    protect: Sequence[int] = PROTECTED,
    kinds: str = "pooled",
) -> np.ndarray:
    """The mean of each group's gate p over the second half of the training; the lowest go.

    Every group has a gate p = sigmoid(s) on what it writes. The weights are frozen. At each step the groups with the
    lowest p are shut until the budget is met, and the model runs without them. The loss is KL(dense ‖ this model) of
    the next token, mean over the tokens. Every gate gets a gradient, shut ones too, as if p stood in the place of 0 or
    1 (straight through). So a group that is missed comes back, and the training sees which groups make up for each
    other, as no ranking of the dense model does. s starts from the order of F/parameters (`saap_plus` ranking once).

    The projection with a straight-through gradient is GRASPrune's (arXiv 2604.19398). Ours are the start, the target
    (the dense model's distribution depends less on the text's domain than the next token does), and the mean over
    steps, because gates near the edge wander. It goes with `search = "global"`.

    Args:
        fisher: float64 (N,), `saap.mask_fisher`.
        tokens: int64 (D, T); several hundred sequences serve better than fifty.
        ratio, protect, kinds: as in `saap.select`.
        seed: the order in which the sequences are taken.

    Raises:
        SaapError: a ratio out of reach, a gradient that is not finite, or weights away from their device.
    """
    if is_offloaded(model):
        raise SaapError("saap_gates needs a model whose weights are all on its device")
    groups = discover(model)
    start = fisher / groups.parameters
    free = ~protected_groups(groups, tuple(protect))
    if kinds == "mlp":
        free &= groups.kind == "mlp"
    place = np.empty(len(groups))
    place[np.argsort(start, kind="stable")] = np.linspace(0, 1, len(groups))
    shut = ~select(start, groups, ratio, kinds=kinds, protect=tuple(protect), align=1)
    logits = STEEPNESS * (place - place[shut].max(initial=0.0))
    moments, mean, counted = np.zeros((2, len(groups))), np.zeros(len(groups)), 0
    budgets = _budgets(groups, free, ratio, kinds)
    order = _batches(len(tokens), seed)
    with frozen(model), _Gates(model) as gates:
        dense = gates.final_states(tokens)
        for step in tqdm(range(STEPS), desc="saap_gates", unit="step"):
            worth = bundled(logits, groups)
            gates.open = np.logical_and.reduce(
                [_projected(np.where(part, worth, np.inf), groups.parameters, budget) for part, budget in budgets]
            )
            chosen = next(order)
            p = 1 / (1 + np.exp(-logits))
            gradient = np.where(free, gates.gradient(tokens[chosen], dense[chosen]) * p * (1 - p), 0)
            if not np.isfinite(gradient).all():
                raise not_finite("the gradient of saap_gates' gates", model)
            for moment, beta, power in zip(moments, BETAS, (gradient, gradient**2), strict=True):
                moment += (1 - beta) * (power - moment)
            first, second = (m / (1 - beta ** (step + 1)) for m, beta in zip(moments, BETAS, strict=True))
            logits -= LEARNING_RATE * (1 - step / STEPS) * first / (np.sqrt(second) + EPSILON)
            if step >= STEPS * (1 - AVERAGED):
                mean, counted = mean + 1 / (1 + np.exp(-logits)), counted + 1
    return mean / counted


def _budgets(groups: Groups, free: np.ndarray, ratio: float, kinds: str) -> list[tuple[np.ndarray, float]]:
    """(bool (N,), parameters to remove of these groups): one for all that is free, or one for each kind."""
    budget = ratio * groups.parameters.sum()
    if kinds != "equal":
        return [(free, budget)]
    parts = [free & (groups.kind == kind) for kind in ("attention", "mlp")]
    return [(part, budget * groups.parameters[part].sum() / groups.parameters[free].sum()) for part in parts]


def _projected(logits: np.ndarray, parameters: np.ndarray, budget: float) -> np.ndarray:
    """bool (N,): open gates; the lowest are shut as far as their parameters fit into the budget."""
    order = np.argsort(logits, kind="stable")
    is_open = np.ones(len(logits), bool)
    is_open[order[np.cumsum(parameters[order]) <= budget]] = False
    return is_open


def _batches(samples: int, seed: int) -> Iterator[torch.Tensor]:
    """Numbers of BATCH sequences (all, when there are fewer), in a new order each round, without what is left over."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(samples, generator=generator).split(BATCH):
            if len(chosen) == min(BATCH, samples):
                yield chosen


class _Gates:
    """Gates on the inputs of the output matrices of a model, while entered. open: bool (N,), which of them let pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.matrices = model, list(output_matrices(model))
        sizes = [linear.in_features // part.width for *_, part, linear in self.matrices]
        self.edges = np.cumsum([0, *sizes])
        self.open = np.ones(self.edges[-1], bool)
        self.slopes: list[torch.Tensor] = []

    def __enter__(self) -> "_Gates":
        self.handles = [
            linear.register_forward_pre_hook(self._hook(number, part.width))
            for number, (*_, part, linear) in enumerate(self.matrices)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, number: int, width: int):  # type: ignore[no-untyped-def]
        start, end = self.edges[number], self.edges[number + 1]

        def hook(linear: nn.Module, inputs: tuple) -> torch.Tensor:
            x: torch.Tensor = inputs[0]
            mask = torch.from_numpy(self.open[start:end]).to(x.device, x.dtype).repeat_interleave(width)
            if torch.is_grad_enabled():
                gated: torch.Tensor = _Gate.apply(x, mask, self.slopes[number], width)
                return gated
            return x * mask

        return hook

    @torch.no_grad()
    def final_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """(D, T, H): what the model gives its head, with the gates as they are."""
        device = input_device(self.model)
        return torch.cat(
            [self.model.base_model(part.to(device), use_cache=False).last_hidden_state for part in tokens.split(8)]  # type: ignore[operator]
        )

    def gradient(self, ids: torch.Tensor, dense: torch.Tensor) -> np.ndarray:
        """float64 (N,): of the mean KL(dense ‖ gated), nats a token, for every gate. dense: (D, T, H), final states."""
        scales = LOSS_SCALES if next(self.model.parameters()).dtype == torch.float16 else (1.0,)
        for scale in scales:
            found = self._slopes(ids, dense, scale) / scale
            if np.isfinite(found).all():
                break
        return found

    def _slopes(self, ids: torch.Tensor, dense: torch.Tensor, scale: float) -> np.ndarray:
        """Of so many times the divergence."""
        device = input_device(self.model)
        self.slopes = [
            torch.zeros(int(end - start), device=linear.weight.device)
            for start, end, (*_, linear) in zip(self.edges, self.edges[1:], self.matrices, strict=False)
        ]
        self.model.eval()
        with torch.enable_grad(), lean(self.model), FastLinears():
            states = self.model.get_input_embeddings()(ids.to(device)).detach().requires_grad_()  # type: ignore[operator]
            last = self.model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state  # type: ignore[operator]
        states, dense = last.detach().flatten(0, 1), dense.flatten(0, 1)
        last.backward(_divergence_gradient(self.model, states, dense, scale).view_as(last))
        return torch.cat([slope.double().cpu() for slope in self.slopes]).numpy()


@torch.no_grad()
def _divergence_gradient(model: nn.Module, states: torch.Tensor, dense: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · ∂/∂states of the mean over tokens of KL(p(dense) ‖ p(states)), p from the model's logits; (tokens, H)."""
    found = []
    step = max(1, LOGITS // model.get_output_embeddings().out_features)  # type: ignore[operator]
    for own, wanted in zip(states.split(step), dense.split(step), strict=True):
        with torch.enable_grad():
            leaf = own.detach().requires_grad_()
            output = logits_of(model, leaf)
        difference = output.detach().softmax(-1) - logits_of(model, wanted).softmax(-1)
        found.append(torch.autograd.grad(output, leaf, difference * (scale / len(states)))[0])
    return torch.cat(found)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, slopes, width):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, mask)
        ctx.slopes, ctx.width = slopes, width
        return x * mask

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, mask = ctx.saved_tensors
        ctx.slopes += (x * gradient).float().flatten(0, -2).sum(0).view(-1, ctx.width).sum(1)
        return gradient * mask, None, None, None
