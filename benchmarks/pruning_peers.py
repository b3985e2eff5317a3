"""Rivals outside our criteria: whole layers go, the package torch-pruning (`pip install`) prunes, or gates learn.

Each is a function of (model, tokens int64 (D, T), ratio of the prunable parameters) that returns a pruned copy.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import saap
from saap.pruning.plan import PROTECTED


@torch.no_grad()
def shortgpt(model: Any, tokens: torch.Tensor, ratio: float) -> Any:
    """ShortGPT (arXiv 2403.03853): layers of lowest influence 1 − E_t cos(h_t in, h_t out) go, none protected."""
    layers = saap.family_of(model.config).layers(model)
    influence = np.zeros(len(layers))

    def hook(layer: int) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            influence[layer] += (1 - F.cosine_similarity(inputs[0].float(), out.float(), dim=-1)).sum().item()

        return see

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(layers)]
    for batch in tokens.to(model.device).split(8):
        model.base_model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return without_layers(model, np.argsort(influence, kind="stable")[: round(ratio * len(layers))])


def shortened_llama(model: Any, tokens: torch.Tensor, ratio: float) -> Any:
    """Shortened LLaMA (arXiv 2402.02834), PPL: layers whose absence raises the perplexity least go, all at once."""
    layers = len(saap.family_of(model.config).layers(model))
    means = [losses(without_layers(model, [layer]), tokens).mean() for layer in range(layers)]
    return without_layers(model, np.argsort(means, kind="stable")[: round(ratio * layers)])


def without_layers(model: Any, gone: Any) -> Any:
    """A copy without these layers. Weights that stay are shared with the model."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    small = copy.deepcopy(model, shared)
    layers = saap.family_of(small.config).layers(small)
    for layer in sorted(map(int, gone), reverse=True):
        del layers[layer]
    small.config.num_hidden_layers = len(layers)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [t for i, t in enumerate(small.config.layer_types) if i not in set(map(int, gone))]
    return small


@torch.no_grad()
def losses(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """float64 (D,): mean next-token cross-entropy of each sequence, nats a token."""
    found = []
    for batch in tokens.to(model.device).split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        found += F.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1).tolist()
    return np.array(found)


def torch_pruning_package() -> Any:
    """The peer's own package. Raises SystemExit where it is not installed."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise SystemExit("the peer torch_pruning needs its package: pip install torch-pruning") from error
    return tp


def torch_pruning(model: Any, tokens: torch.Tensor, ratio: float) -> Any:
    """Torch-Pruning (VainF): its group Taylor importance over all channels in one global order; heads stay.

    The layers that `saap.select` protects are left whole here too.
    """
    tp, tokens = torch_pruning_package(), tokens.to(model.device)
    small = copy.deepcopy(model).float()
    layers = saap.family_of(small.config).layers(small)
    free = [layer for i, layer in enumerate(layers) if i not in {p % len(layers) for p in PROTECTED}]
    gates = {layer.mlp.gate_proj for layer in free}
    groups = saap.discover(model)
    channels = sum(int(gate.out_features) for gate in gates)
    cost = int(groups.parameters[groups.kind == "mlp"][0])
    for batch in tokens.split(4):
        small(batch, labels=batch, use_cache=False).loss.mul(len(batch) / len(tokens)).backward()
    pruner = tp.pruner.BasePruner(
        small,
        tokens[:1],
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio * int(groups.parameters.sum()) / (cost * channels),
        ignored_layers=[
            module
            for module in small.modules()
            if isinstance(module, nn.Linear | nn.Embedding)
            and module not in gates | {layer.mlp.up_proj for layer in free}
        ],
        forward_fn=lambda net, ids: net(ids, use_cache=False).logits,
    )
    pruner.step()
    small.zero_grad(set_to_none=True)
    return small.to(model.dtype)


TAU, RATE, EPOCHS, SWING = 1.5, 1e-2, 4, 0.5  # of GRASPrune's code


def grasprune(model: Any, tokens: torch.Tensor, ratio: float) -> Any:
    """GRASPrune (arXiv 2604.19398) as its authors' code does it for a LLaMA, a sequence a step; no layer is protected.

    Gates of KV groups (on k and v) and of channels learn from the next token's loss, straight through their projection
    on the budget, in four passes over the text. In a fifth the kept ones learn scales of ½ to 1½, which are folded in.
    As there, a layer that would lose all keeps one of each kind beyond the budget, and the sort decides between equals.
    """
    groups, generator = saap.discover(model), torch.Generator().manual_seed(42)
    # channels before heads: at first all gates are equal, and a sort of other places would begin with other ones
    order = torch.from_numpy(np.lexsort((groups.unit, groups.kind == "attention", groups.layer)))
    costs = torch.from_numpy(groups.parameters).double()

    def projected(scores: torch.Tensor) -> torch.Tensor:
        ranked = order[(scores[order] / TAU).sigmoid().argsort(descending=True)]
        mask = torch.zeros(len(groups))
        mask[ranked[costs[ranked].cumsum(0) <= (1 - ratio) * costs.sum()]] = 1
        for *_, index in groups.structures():
            if not mask[index].any():
                mask[index[0] + int(scores[index].argmax())] = 1
        return mask

    def straight_through(scores: torch.Tensor) -> torch.Tensor:
        soft = (scores / TAU).sigmoid()
        return projected(scores.detach()) + (soft - soft.detach())

    def learnt(gates_of: Callable[[torch.Tensor], torch.Tensor], passes: int) -> torch.Tensor:
        scores = torch.zeros(len(groups), requires_grad=True)
        optimizer = torch.optim.AdamW([scores], lr=RATE, betas=(0.9, 0.99), weight_decay=0)
        for row in (row for _ in range(passes) for row in torch.randperm(len(tokens), generator=generator)):
            ids = tokens[row, None].to(model.device)
            with _gated(model, groups, gates_of(scores)):
                (scores.grad,) = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, [scores])
            optimizer.step()
        return scores.detach()

    mask = projected(learnt(straight_through, EPOCHS))
    scales = 1 + SWING * learnt(lambda scores: mask * (1 + SWING * scores.tanh()), 1).tanh()
    small = saap.prune(model, mask.bool().numpy())
    layers = saap.family_of(small.config).layers(small)
    for layer, kind, index in groups.structures():
        kept = scales[index][mask[index] > 0].to(model.device, model.dtype)
        attention, mlp = layers[layer].self_attn, layers[layer].mlp
        if kind == "mlp":
            mlp.down_proj.weight.data *= kept
        else:
            for linear in (attention.k_proj, attention.v_proj):
                linear.weight.data *= kept.repeat_interleave(attention.head_dim)[:, None]
    return small


@contextmanager
def _gated(model: Any, groups: Any, gates: torch.Tensor) -> Iterator[None]:
    """While entered, every group of a LLaMA is multiplied by its gate: heads on k and v, channels before down_proj."""
    handles, layers = [], saap.family_of(model.config).layers(model)
    for layer, kind, index in groups.structures():
        attention, mlp, own = layers[layer].self_attn, layers[layer].mlp, gates[index].to(model.device, model.dtype)
        if kind == "mlp":
            handles.append(mlp.down_proj.register_forward_pre_hook(lambda _, x, own=own: x[0] * own))
        else:
            wide = own.repeat_interleave(attention.head_dim)
            keys_and_values = (attention.k_proj, attention.v_proj)
            handles += [m.register_forward_hook(lambda _, x, y, wide=wide: y * wide) for m in keys_and_values]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


PEERS = {
    "shortgpt": shortgpt,
    "shortened_llama": shortened_llama,
    "torch_pruning": torch_pruning,
    "grasprune": grasprune,
}
