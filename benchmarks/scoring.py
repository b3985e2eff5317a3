"""Scoring against the straightforward way: agreement, time, and memory, alternating in one process.

    python benchmarks/scoring.py                          # the embedded SmolLM2-135M, 50 × 128 tokens
    python benchmarks/scoring.py --model /models/llama    # any local folder of a family we know
    python benchmarks/scoring.py --llama-7b               # on a GPU: LLaMA-7B's shape, random bfloat16 weights

The straightforward way: batch 1, one backward pass a sample with the gradients of all weights, and the sums over the
groups afterwards. The floor: three forward passes (forward, gradients of activations, gradients of weights). Peaks are
what is held above the weights: on a GPU the allocator's, on a CPU the resident memory's. On an x86 CPU scoring takes
its float32 products from oneDNN, PyTorch from MKL: "ours, PyTorch's products" is what the method alone gives. "Of
bound" is the share of our seconds that our products would take, were each as fast as the fastest one here. Prints
tables and, as its last line, one JSON object.
"""

import argparse
import ctypes
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    SHAPES,
    clock,
    counts_processor_time,
    embedded,
    fastest_product_of,
    held,
    most_held,
    operations_of,
    random_llama,
    where,
)
from torch import nn

import saap
from saap.evaluation.speed import in_turn
from saap.models import products
from saap.models.groups import KINDS, layer_parts
from saap.scoring.importance import samples_at_once

PLACE = "cuda" if torch.cuda.is_available() else "cpu"
Scores = tuple[np.ndarray, np.ndarray]  # (vector, element)


def straightforward(model: nn.Module, tokens: torch.Tensor) -> Scores:
    """(vector, element), float32 (D, N), as `saap.score` gives them."""
    parts = layer_parts(model)
    device = next(model.parameters()).device
    vectors, elements = [], []
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for ids in tokens.to(device)[:, None]:
        model(ids, labels=ids, use_cache=False).loss.backward()
        vector, element = [], []
        for kinds in parts:
            for kind in KINDS:
                coarse, fine = [], []
                for part, linear in kinds[kind]:
                    # the gradient is not needed again: its memory takes the products
                    s = linear.weight.grad.mul_(linear.weight.detach())
                    coarse.append(s.sum(1 - part.axis, dtype=torch.float32).abs().view(-1, part.width).sum(1))
                    second = s.addcmul_(s, s, value=-0.5).abs_()
                    fine.append(second.sum(1 - part.axis, dtype=torch.float32).view(-1, part.width).sum(1))
                vector.append(torch.stack(coarse).sum(0))
                element.append(torch.stack(fine).sum(0))
        vectors.append(torch.cat(vector).cpu())
        elements.append(torch.cat(element).cpu())
        model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return torch.stack(vectors).numpy(), torch.stack(elements).numpy()


def forward(model: nn.Module, tokens: torch.Tensor) -> None:
    """One forward pass a sample, logits and loss included, with the batch size scoring has."""
    device = next(model.parameters()).device
    size = samples_at_once(model, tokens.shape[1])
    with torch.no_grad():
        for ids in tokens.to(device).split(size):
            model(ids, labels=ids, use_cache=False)


def seconds(action: Callable[[], object]) -> float:
    """Of wall time, or of the processor's (`clock`)."""
    start = clock(PLACE)
    action()
    return clock(PLACE) - start


def peak_above(action: Callable[[], object], device: torch.device) -> int:
    """The most bytes held during the action beyond those held before it."""
    ctypes.CDLL(None).malloc_trim(0)
    before = held(device)
    return most_held(action, device) - before


def the_model(arguments: argparse.Namespace) -> nn.Module:
    """The model to score, on its device, with no gradients asked of it."""
    if arguments.shape:
        if arguments.shape == "llama-7b" and arguments.device == "cpu":
            raise SystemExit("LLaMA-7B's shape needs a GPU and torch sees none here: nothing was measured")
        model = random_llama(arguments.shape, arguments.device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = arguments.model or embedded(Path(folder))
            model = saap.load(checkpoint, device=arguments.device, dtype=arguments.dtype)
    return model.eval().requires_grad_(False)


def fewer_blocks(model: nn.Module) -> tuple[nn.Module, int]:
    """The same model with the first half of its layers, which it shares."""
    import copy

    memo = {id(parameter): parameter for parameter in model.parameters()}
    half = copy.deepcopy(model, memo)
    layers = saap.family_of(model.config).layers(half)
    del layers[len(layers) // 2 :]
    half.config.num_hidden_layers = len(layers)
    return half, len(layers)


def the_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local model folder (default: the embedded SmolLM2-135M)")
    parser.add_argument("--shape", choices=SHAPES, help="random bfloat16 weights of this shape instead of a model")
    parser.add_argument("--llama-7b", dest="shape", action="store_const", const="llama-7b", help="on a GPU")
    parser.add_argument("--device", default=PLACE)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--rounds", type=int, default=3, help="times each side is timed, in turn")
    return parser.parse_args()


def peaks_of(model: nn.Module, tokens: torch.Tensor, weights: int) -> dict[str, float]:
    """The peak of each side above the weights, in multiples of them."""
    forward(model, tokens[:1])  # so that what is made once is not counted
    device = next(model.parameters()).device
    a_pass = max(4, samples_at_once(model, tokens.shape[1]))
    return {
        "ours": peak_above(lambda: saap.score(model, tokens[:a_pass]), device) / weights,
        "straightforward": peak_above(lambda: straightforward(model, tokens[:2]), device) / weights,
    }


def timed(model: nn.Module, tokens: torch.Tensor, rounds: int) -> tuple[dict[str, list[float]], dict[str, Scores]]:
    """The seconds of each side, in turn, and the scores of the two ways."""

    def with_pytorchs_products() -> None:
        there, products.THERE = products.THERE, False
        saap.score(model, tokens)
        products.THERE = there

    found: dict[str, Scores] = {}
    sides: dict[str, Callable[[], object]] = {
        "straightforward": lambda: found.update(straightforward=straightforward(model, tokens)),
        "ours": lambda: found.update(ours=saap.score(model, tokens)),
        "forward": lambda: forward(model, tokens),
    }
    if products.by_onednn() and model.device.type == "cpu" and model.dtype == torch.float32:
        sides["ours, PyTorch's products"] = with_pytorchs_products
    taken = in_turn({side: partial(seconds, action) for side, action in sides.items()}, rounds, 0, "rounds")
    return taken, found


def ratios_of(taken: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """What was timed, round by round, as ratios."""
    same_products = taken.get("ours, PyTorch's products", taken["ours"])
    return {
        "straightforward / ours": np.divide(taken["straightforward"], taken["ours"]),
        "the same, PyTorch's products": np.divide(taken["straightforward"], same_products),
        "ours / 3 forwards": np.divide(taken["ours"], taken["forward"]) / 3,
    }


def errors_of(found: dict[str, Scores]) -> tuple[list[float], list[float]]:
    """Relative errors of a sample, of vector and element: the largest, and the median."""
    by_sample = [
        np.linalg.norm(mine - plain, axis=1) / np.linalg.norm(plain, axis=1)
        for mine, plain in zip(found["ours"], found["straightforward"], strict=True)
    ]
    return [float(e.max()) for e in by_sample], [float(np.median(e)) for e in by_sample]


def growth_of(model: nn.Module, tokens: torch.Tensor) -> list[tuple[int, int, float]]:
    """(samples, layers, seconds): a quarter of the samples, twice as many, and these with half of the layers."""
    layers, few = len(layer_parts(model)), max(1, len(tokens) // 4)
    half, half_layers = fewer_blocks(model)
    return [
        (few, layers, seconds(lambda: saap.score(model, tokens[:few]))),
        (2 * few, layers, seconds(lambda: saap.score(model, tokens[: 2 * few]))),
        (2 * few, half_layers, seconds(lambda: saap.score(half, tokens[: 2 * few]))),
    ]


def print_table(taken: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Seconds and peaks, a line a side."""
    print(f"\n{'':<26}{'seconds':>10}{'spread':>9}{'peak above weights':>21}")
    for side, times in taken.items():
        middle = float(np.median(times))
        peak = f"{peaks[side]:.2f} × weights" if side in peaks else ""
        print(f"{side:<26}{middle:>10.2f}{(max(times) - min(times)) / middle:>9.0%}{peak:>21}")


def main() -> None:
    arguments = the_arguments()
    model = the_model(arguments)
    device = next(model.parameters()).device
    layers = len(layer_parts(model))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.samples, arguments.length), generator=generator)
    print(f"{model.config.model_type}, {layers} layers, {weights / 1e9:.2f} GB of {model.dtype} weights")
    print(f"{arguments.samples} × {arguments.length} tokens, {arguments.rounds} rounds, {where(device)}")
    if device.type == "cpu":
        print("no GPU was used" + ("; seconds of processor time" if counts_processor_time(PLACE) else ""))

    peaks = peaks_of(model, tokens, weights)
    taken, found = timed(model, tokens, arguments.rounds)
    ratios, (errors, middle_errors) = ratios_of(taken), errors_of(found)
    growth = growth_of(model, tokens)
    few = tokens[: samples_at_once(model, arguments.length)]
    operations = operations_of(lambda: saap.score(model, few)) * len(tokens) / len(few)
    of_bound = operations / fastest_product_of(model) / float(np.median(taken["ours"]))

    print_table(taken, peaks)
    for what, values in ratios.items():
        print(f"{what:<30} {np.median(values):.2f} (paired; {min(values):.2f} to {max(values):.2f})")
    print(
        f"relative error of a sample, largest and median: vector {errors[0]:.1e} and {middle_errors[0]:.1e}, "
        f"element {errors[1]:.1e} and {middle_errors[1]:.1e}\n"
    )
    print(f"ours: {operations / 1e9:.0f} GFLOP, {of_bound:.0%} of bound")
    for n, k, t in growth:
        print(f"{f'{n} samples, {k} layers':<26} {t:6.2f} s   {1000 * t / n / k:6.2f} ms a sample and layer")
    figures = {
        "time_ratio": float(np.median(ratios["straightforward / ours"])),
        "time_ratio_same_products": float(np.median(ratios["the same, PyTorch's products"])),
        "floor_ratio": float(np.median(ratios["ours / 3 forwards"])),
        "of_bound": of_bound,
        "peak_above_weights_ratio": peaks["ours"],
        "straightforward_peak_ratio": peaks["straightforward"],
        "max_relative_error": max(errors),
        "median_relative_error": max(middle_errors),
        "products": "oneDNN" if products.by_onednn() else "PyTorch's",
        "seconds": float(np.median(taken["ours"])),
        "seconds_by_samples": {str(n): t for n, k, t in growth if k == layers},
        "seconds_by_blocks": {str(k): t for n, k, t in growth if n == growth[-1][0]},
    }
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({**rounded, "device": where(device), "weight_bytes": weights}))


if __name__ == "__main__":
    main()
