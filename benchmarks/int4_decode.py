"""Decoding from int4 codes: a model pruned by half and recovered in int4 against the dense one in bfloat16, batch 1.

    python benchmarks/int4_decode.py                      # on a GPU: LLaMA-7B's shape, CUDA graphs; else SmolLM2-135M's
    python benchmarks/int4_decode.py --shape smollm2-135m

Random weights: speed does not depend on the values. One static cache a model; on a GPU each step is one replay of a
CUDA graph, so that launching kernels does not hide the model. Models decode in turn; ratios are of the same round.
Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
}


def dense_model(shape: str, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(max_position_embeddings=2048, dtype="bfloat16", **SHAPES[shape])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.tie_weights()
    return model


def halved_int4(dense: Any) -> tuple[Any, int]:
    """(half of the prunable parameters in int4 on PyTorch's kernels, bytes of its weights as stored)."""
    from saap import discover, prune, select, size_of, to_groupwise, use_int4_kernels

    groups = discover(dense)
    keep = select(np.random.default_rng(0).random(len(groups)), groups, 0.5)
    small = to_groupwise(prune(dense, keep), 32, consume=True)
    stored = size_of(small).weight_bytes
    left = use_int4_kernels(small)
    if left:
        print(f"{left} layers do not fit the kernel and run the plain path")
    return small, stored


def decoder(model: Any, device: str, context: int, tokens: int) -> Callable[[], float]:
    """A function that decodes `tokens` tokens after a prompt of `context` and returns tokens a second."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + tokens + 8)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def step() -> None:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    def begin() -> None:
        cache.reset()
        prompt = torch.arange(context, device=device)[None] % model.config.vocab_size
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    begin()
    advance = step
    if device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        advance = graph.replay

    def run() -> float:
        begin()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            advance()
        if device == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - start)

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = arguments.device
    shape = arguments.shape or ("llama-7b" if device == "cuda" else "smollm2-135m")

    dense = dense_model(shape, device)
    dense_bytes = sum(p.numel() * p.element_size() for p in dense.parameters())
    small, small_bytes = halved_int4(dense)
    runs = {m: decoder(x, device, arguments.context, arguments.tokens) for m, x in (("dense", dense), ("int4", small))}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            rate = run()
            if repeat:
                rates[name].append(rate)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ratios = np.array(rates["int4"]) / np.array(rates["dense"])
    print(f"{shape}, context {arguments.context}, {arguments.tokens} tokens, {arguments.repeats} rounds, on {where}")
    if device == "cpu":
        print("no GPU here: nothing is claimed about one")
    print(f"{'':<22}{'tokens/s':>10}{'weights MB':>12}")
    print(f"{'dense bfloat16':<22}{np.median(rates['dense']):>10.1f}{dense_bytes / 1e6:>12.0f}")
    print(f"{'half, int4':<22}{np.median(rates['int4']):>10.1f}{small_bytes / 1e6:>12.0f}")
    print(f"decode {np.median(ratios):.2f}× (of the rounds {ratios.min():.2f} to {ratios.max():.2f})")
    figures = {
        "int4_over_dense_decode": round(float(np.median(ratios)), 3),
        "weights_over_dense": round(small_bytes / dense_bytes, 4),
        "shape": shape,
        "device": where,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
