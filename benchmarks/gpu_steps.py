"""Steps of benchmarks/gpu.py that no other benchmark measures: kernels, Fisher and refit, a whole run."""

import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import held, most_held, random_llama

import saap
from saap.int4.kernels import Int4Linear
from saap.scoring import salience

HERE = Path(__file__).resolve().parents[1]
Figures = dict[str, Any]


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def best_seconds(action: Callable[[], object], device: str, times: int) -> float:
    """The best of `times` on a CPU; on a GPU the median by events, with its cache emptied before each."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return float(do_bench(action, return_mode="median")) / 1000
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def kernels(device: str, tiny: bool) -> Figures:
    """The sums over ∂L/∂W against float64, and the int4 product against the weights its codes stand for."""
    figures: Figures = {"triton": salience.salience_triton is not None and device.startswith("cuda")}
    shapes = [(200, 130), (64, 300)] + ([] if tiny else [(11008, 4096), (4096, 11008)])
    worst = max(
        _salience_error(shape, dtype, axis, hessian, scale, device)
        for shape in shapes
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for axis in (0, 1)
        for hessian, scale in (("none", 1.0), ("fisher", 1024.0))
    )
    figures["triton_error" if figures["triton"] else "plain_error"] = worst
    out, inside = (64, 128) if tiny else (11008, 4096)
    figures["int4_error"] = max(_int4(out, inside, group_size, device)[0] for group_size in (32, 64, 128))
    _, taken = _int4(out, inside, 32, device)
    return figures | {f"{name}_us": round(1e6 * seconds, 1) for name, seconds in taken.items()}


def _salience_error(
    shape: tuple[int, int], dtype: torch.dtype, axis: int, hessian: str, scale: float, device: str
) -> float:
    """The largest difference of a channel's sums from those in float64, in parts of its Σ |s|."""
    torch.manual_seed(0)
    out, inside = shape
    weight = torch.randn(out, inside, device=device).to(dtype)
    delta = (scale * 1e-2 * torch.randn(2, 37, out, device=device)).to(dtype)
    x = torch.randn(2, 37, inside, device=device).to(dtype)
    sums = salience.channel_sums(weight, delta, x, axis, hessian=hessian, scale=scale).double()
    worst = 0.0
    for b in range(2):
        s = weight.double() * (delta[b].double().T / scale @ x[b].double())
        second = s - s.square() / 2
        signed, element = (s if hessian == "none" else second).sum(1 - axis), second.abs().sum(1 - axis)
        for found, exact in ((sums[0, b], signed), (sums[1, b], element)):
            worst = max(worst, float(((found - exact).abs() / element).max()))
    return worst


def _int4(out: int, inside: int, group_size: int, device: str) -> tuple[float, dict[str, float]]:
    """Relative error of the int4 product in norm, and seconds of one token's: from codes, and in bfloat16."""
    torch.manual_seed(1)
    linear = saap.GroupwiseLinear(inside, out, group_size)
    codes, linear.scale, linear.zero = saap.quantize(torch.randn(out, inside) / inside**0.5, group_size)
    linear.codes = codes[:, ::2] | codes[:, 1::2] << 4
    linear = linear.to(device)
    assert Int4Linear.fits(linear), "no int4 kernel for this device"
    fast, x = Int4Linear(linear), torch.randn(1, inside, device=device).bfloat16()
    exact = x.double() @ linear.weight().double().T
    error = float((fast(x).double() - exact).norm() / exact.norm())
    plain = linear.weight(torch.bfloat16)
    seconds = {
        "int4": best_seconds(lambda: fast(x), device, 20),
        "bfloat16": best_seconds(lambda: torch.nn.functional.linear(x, plain), device, 20),
    }
    return error, seconds


def fisher_and_refit(device: str, tiny: bool) -> Figures:
    """Seconds and peak, above what was held before, of what `saap_plus` and learned gates do at LLaMA-7B's shape."""
    model = random_llama("tiny" if tiny else "llama-7b", device)
    samples, length = (4, 16) if tiny else (50, 128)
    tokens = torch.randint(0, model.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
    figures: Figures = {}
    kept: dict[str, Any] = {}

    def measure(name: str, action: Callable[[], object]) -> None:
        before = held(device)
        start = time.perf_counter()

        def run() -> None:
            kept[name] = action()
            synchronise(device)

        figures[f"{name}_peak_gib"] = round((most_held(run, device) - before) / 2**30, 3)
        figures[f"{name}_seconds"] = round(time.perf_counter() - start, 2)

    measure("mask_fisher", lambda: saap.mask_fisher(model, tokens))
    if "saap_gates" in saap.CRITERIA:
        gates: Any = importlib.import_module("saap.criteria.saap_gates")  # the package has the function by this name
        gates.STEPS = 10  # of 120: the seconds are in proportion
        measure("gates_10_steps", lambda: gates.saap_gates(model, kept["mask_fisher"], tokens, 0.2, 0))
    groups = saap.discover(model)
    keep = saap.select(kept["mask_fisher"], groups, 0.2)
    small = saap.prune(model, keep)
    measure("refit", lambda: saap.refit(small, model, keep, tokens[:16]))
    return figures


def whole_run(device: str, tiny: bool) -> Figures:
    """Score, prune, recover and evaluate a toy model on the device and on the CPU: how far the results are apart."""
    count = 16 if tiny else 48  # rows of recovery
    results = {place: _job(place, count) for place in dict.fromkeys(("cpu", device))}
    ours, reference = results[device], results["cpu"]
    figures: Figures = {
        f"perplexity_error_{variant}": abs(ours[variant] / reference[variant] - 1)
        for variant in ("dense", "pruned", "recovered")
    }
    figures["plan_difference"] = float(np.mean(ours["plan"] != reference["plan"]))
    figures["score_error"] = float(
        np.linalg.norm(ours["score"] - reference["score"]) / np.linalg.norm(reference["score"])
    )
    return figures | {f"perplexity_{name}": round(ours[name], 2) for name in ("dense", "pruned", "recovered")}


def _job(device: str, count: int) -> Figures:
    model = random_llama("tiny", "cpu").float().to(device)
    tokenizer = byte_tokenizer()
    text = (HERE / "README.md").read_text().split("\n\n")
    rows = [json.loads(line) for line in (HERE / "tasks/mini/alpaca/train.jsonl").read_text().splitlines()]
    ids = tokenizer("\n".join(text))["input_ids"]
    tokens = torch.tensor(ids[: 8 * 64]).view(8, 64)
    groups = saap.discover(model)
    vector, element = saap.score(model, tokens)
    fused, *_ = saap.fuse(vector, element, groups)
    stability = saap.asi(saap.fluctuation(fused, saap.weight_norms(model)), groups)
    keep = saap.select(stability, groups, 0.2)
    small = saap.prune(model, keep)
    found: Figures = {"plan": keep, "score": element}
    for name, variant in (("dense", model), ("pruned", small)):
        found[name] = saap.perplexity(variant, text, tokenizer, window=64, max_tokens=4096).value
    training = saap.Training(batch_size=8, micro_batch_size=8, max_length=512, warmup_steps=1, precision="float32")
    with tempfile.TemporaryDirectory() as work:
        recovered, _ = saap.recover(small, rows[:count], tokenizer, work, saap.Groupwise(rank=8), training)
    found["recovered"] = saap.perplexity(saap.dequantize(recovered), text, tokenizer, window=64, max_tokens=4096).value
    return found


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes, that needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["</s>", *letters])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
