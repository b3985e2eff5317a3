"""Decode and prefill speed of a dense model, pruned by 20 % and 50 % of its prunable parameters, and 50 % in int4.

    python benchmarks/speed.py                    # the embedded SmolLM2-135M on a CPU, or LLaMA-7B's shape on a GPU
    python benchmarks/speed.py --model FOLDER --device cpu

By the pipeline's protocol: forced length, 3 warm-ups, models in turn, medians, ratios of the same round. Plans are
uniform (the same share of every unprotected layer), ranked by weight norms: speed depends on the widths only. On a GPU:
bfloat16, random weights, batch 1 and 16, CUDA graphs over a static cache, eager beside them, and the share of the
bandwidth limit: bytes read a step (weights without the embedding table, and the cache at its mean length) × steps/s
over the rate at which this GPU reads a large tensor, measured here. Prints a table and,
as its last line, one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, embedded, random_llama

import saap

RATIOS = {"dense": None, "20": 0.2, "50": 0.5}


def variants(dense: Any) -> dict[str, Any]:
    groups = saap.discover(dense)
    norms = saap.weight_norms(dense)
    made = {}
    for name, ratio in RATIOS.items():
        plan = None if ratio is None else saap.select(norms, groups, ratio, search="uniform")
        made[name] = dense if plan is None else saap.prune(dense, plan)
    made["50_int4"] = saap.to_groupwise(made["50"], 32)
    return made


def read_bandwidth() -> float:
    """Bytes a second at which the GPU sums a tensor of 4 GiB, the best of ten."""
    big = torch.ones(1 << 30, device="cuda")
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        big.sum()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return big.numel() * 4 / best


def bytes_a_step(model: Any, batch_size: int, length: float) -> float:
    """What a step reads: every weight and code but the embedding table (unless the head shares it), keys and values."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    stored = [*model.parameters(), *(b for name, b in model.named_buffers() if not name.endswith("inv_freq"))]
    weights = sum(t.numel() * t.element_size() for t in stored)
    if head is not table:
        weights -= table.numel() * table.element_size()
    heads = sum(c.num_key_value_heads * c.head_dim for c in saap.family_of(model.config).layer_configs(model))
    return weights + batch_size * length * 2 * heads * table.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder of a Llama-like model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="random bfloat16 weights of this shape instead of a model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    device = arguments.device
    on_gpu = device.startswith("cuda")
    if not on_gpu:
        print("no GPU is used: this is the CPU's comparison; the bandwidth figures need one")
    if arguments.shape or (on_gpu and not arguments.model):
        dense = random_llama(arguments.shape or "llama-7b", device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = arguments.model or embedded(Path(folder))
            dense = saap.load(checkpoint, dtype="bfloat16" if on_gpu else "float32", device=device)
    models = variants(dense)
    sizes = {name: saap.size_of(model) for name, model in models.items()}
    saap.use_int4_kernels(models["50_int4"])
    bandwidth = read_bandwidth() if on_gpu else None
    lengths = {"prompt_tokens": arguments.prompt, "new_tokens": arguments.new, "runs": arguments.runs}
    figures: dict[str, Any] = {}
    for batch_size in (1, 16) if on_gpu else (1,):
        rows = saap.compare_speed(models, sizes, batch_size=batch_size, **lengths)
        suffix = "" if batch_size == 1 else f"_batch{batch_size}"
        print(
            f"batch {batch_size}, {arguments.prompt} + {arguments.new} tokens, {arguments.runs} runs, {rows[0].dtype}, "
            f"{rows[0].device}, {rows[0].threads} threads, uniform plans"
        )
        print(
            "removed  params   weights     peak   MACs/token  decode tok/s  spread  ratio   eager  prefill tok/s  ratio"
        )
        for row in rows:
            print(
                f"{row.variant:>7} {row.parameters / 1e6:7.1f}M {row.weight_bytes / 1e6:6.0f} MB "
                f"{row.peak_bytes / 1e6:8.0f} "
                f"{row.macs_per_token / 1e6:11.1f}M {row.tokens_per_s:13.1f} {row.tokens_per_s_spread:7.1%} "
                f"{row.decode_ratio:5.2f}× {row.eager_tokens_per_s:7.1f} {row.prefill_tokens_per_s:14.1f} "
                f"{row.prefill_ratio:5.2f}×"
            )
            if row.variant != "dense":
                figures[f"decode_ratio_{row.variant}{suffix}"] = round(row.decode_ratio, 3)
                figures[f"prefill_ratio_{row.variant}{suffix}"] = round(row.prefill_ratio, 3)
            figures[f"decode_{row.variant}_tokens_per_s{suffix}"] = round(row.tokens_per_s, 2)
            if bandwidth is not None:
                read = bytes_a_step(models[row.variant], batch_size, arguments.prompt + arguments.new / 2)
                share = read * row.tokens_per_s / batch_size / bandwidth
                figures[f"bandwidth_share_{row.variant}{suffix}"] = round(share, 3)
                figures[f"peak_mb_{row.variant}{suffix}"] = round(row.peak_bytes / 1e6)
    if bandwidth is not None:
        print(f"read bandwidth, measured: {bandwidth / 1e9:.0f} GB/s")
        figures["read_bandwidth_gb_s"] = round(bandwidth / 1e9)
        for name in models:
            print(f"share of the limit, {name}: {figures[f'bandwidth_share_{name}']:.0%} at batch 1")
    print(json.dumps({"device": rows[0].device, "threads": rows[0].threads, **figures}))


if __name__ == "__main__":
    main()
