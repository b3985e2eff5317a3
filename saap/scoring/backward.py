"""The backward pass that scores need: to the embeddings, with no gradient of a weight, in little memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from saap.models.families import family_of
from saap.models.groups import weight_of
from saap.models.lean import again, attending, fastest_attention, lean
from saap.models.logits import cross_entropy
from saap.models.offload import input_device, is_offloaded
from saap.models.products import FastLinears
from saap.progress import tqdm

PLAIN_UP_TO = 128  # tokens: beyond that the probabilities of plain attention are more than the rest that is kept
# The loss of a float16 model is scaled, by powers of two so that undoing it is exact: its gradients of 1e-8 would be
# zero in float16. Where the scaled ones overflow the pass is made again with the next scale.
LOSS_SCALES = (2.0**16, 2.0**8, 1.0)


def backward(model: nn.Module, batch: torch.Tensor, scale: float = 1.0, *, recompute: bool = False) -> None:
    """Backward pass of scale·Σ_d L_d, L_d the mean next-token cross-entropy of row d of batch, int64 (D, T).

    It is there for hooks to watch: no parameter gets a gradient. The logits are made in pieces and never kept.

    recompute: the forward pass keeps only the inputs of layers, and the backward pass repeats each layer: a third more
    arithmetic, for many more tokens in the same memory. Always so where weights are not on their device (accelerate's
    offload); the inputs then wait on the CPU.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    ids = batch.to(input_device(model))
    attention = fastest_attention(model, ids.device.type, embedding.weight.dtype, ids.shape[1], PLAIN_UP_TO)
    with frozen(model), lean(model), attending(model, attention):
        with torch.enable_grad(), _recomputed(model) if recompute or is_offloaded(model) else FastLinears():
            states = embedding(ids).detach().requires_grad_()
            last = model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state  # type: ignore[operator]
        predicting, targets = last.detach()[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(last.device)
        gradient = torch.zeros_like(last)
        form = family_of(model.config).logits(model.config)
        weight = weight_of(head, last.device)
        _, found = cross_entropy(weight, head.bias, predicting, targets, *form, factor=scale / (ids.shape[1] - 1))
        gradient[:, :-1] = found.view_as(gradient[:, :-1])
        last.backward(gradient)


@contextmanager
def watch_gradients(linears: list[nn.Linear], see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While open, a backward pass calls see(index, x, δ) for each linear: its input and its output's gradient."""
    latest: list[Any] = [None, None]  # the last input that was made again, behind what made it: linears share them

    def hook(index: int) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def forward(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:  # not in a forward pass that will be repeated
                kept = [_keep(inputs[0], latest)]  # until it is seen: the graph lives longer
                output.register_hook(lambda delta: see(index, kept.pop()(), delta.detach()))

        return forward

    with ExitStack() as stack:
        for index, linear in enumerate(linears):
            handle = linear.register_forward_hook(hook(index))
            stack.callback(handle.remove)
        yield


def _keep(x: torch.Tensor, latest: list[Any]) -> Callable[[], torch.Tensor]:
    """Gives x again; where autograd keeps what it was made of (a norm, the gate of an MLP, a product), from that."""
    node: Any = x.grad_fn
    make = again(x)
    if make is not None:

        def shared() -> torch.Tensor:
            if latest[0] is not node:
                latest[:] = node, make()
            made: torch.Tensor = latest[1]
            return made

        return shared
    if type(node).__name__ == "MulBackward0" and node._saved_self is not None and node._saved_other is not None:
        return lambda: (node._saved_self * node._saved_other).detach()
    x = x.detach()
    return lambda: x


def see_gradients(
    model: nn.Module,
    tokens: torch.Tensor,
    linears: list[nn.Linear],
    see: Callable[[int, torch.Tensor, torch.Tensor], None],
    *,
    batch_size: int,
    name: str,
) -> None:
    """Backward passes over tokens int64 (D, T), `batch_size` sequences at once: `watch_gradients` of all of them.

    name: of the progress bar. The model is put into eval mode.
    """
    model.eval()
    with tqdm(total=len(tokens), desc=name, unit="sample") as bar:
        for batch in tokens.split(batch_size):
            scale = loss_scale(model, batch, linears)
            with watch_gradients(linears, unscaled(see, scale)):
                backward(model, batch, scale)
            bar.update(len(batch))


def loss_scale(model: nn.Module, batch: torch.Tensor, linears: list[nn.Linear]) -> float:
    """1, or for a float16 model the largest of LOSS_SCALES with which no gradient of this batch overflows."""
    if next(model.parameters()).dtype != torch.float16:
        return 1.0
    for scale in LOSS_SCALES:
        finite: list[torch.Tensor] = []
        with watch_gradients(linears, lambda _, x, delta, finite=finite: finite.append(delta.isfinite().all())):  # type: ignore[misc]
            backward(model, batch, scale)
        if all(finite):
            break
    return scale


def unscaled(see: Callable[..., None], scale: float) -> Callable[..., None]:
    """`see` for passes of a loss that is scaled: its last argument, the gradient, is in float32 then."""
    return see if scale == 1 else lambda *seen: see(*seen[:-1], seen[-1].float() / scale)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While open, no parameter asks for a gradient, so that nothing is kept to compute one."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """While open, a forward pass keeps only the inputs of layers; its backward pass repeats each layer."""
    layers = family_of(model.config).layers(model)
    own = [layer.__dict__.get("forward") for layer in layers]  # accelerate's, around the class's
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)
    try:
        with torch.autograd.graph.save_on_cpu() if is_offloaded(model) else nullcontext():
            yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _checkpointed(forward: Callable, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
    def run(*inputs: torch.Tensor) -> object:
        with FastLinears():  # the second time too
            return forward(*inputs, **kwargs)

    # reentrant: the first pass builds no graph, which would hold on to the weights it used
    return checkpoint(run, hidden, *args, use_reentrant=True, preserve_rng_state=False)
