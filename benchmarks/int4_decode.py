"""Decoding from int4 codes: a model pruned by half and held in int4 against the dense one in bfloat16, batch 1.

    python benchmarks/int4_decode.py                      # on a GPU: LLaMA-7B's shape, CUDA graphs; else SmolLM2-135M's
    python benchmarks/int4_decode.py --shape smollm2-135m

Random weights and scores: speed does not depend on the values. By the pipeline's protocol: models in turn, medians,
ratios of the same round. The bytes of LLaMA-7B's weights are counted everywhere, from tensors without storage. Prints a
table and, as its last line, one JSON object.
"""

import argparse
import json
from typing import Any

import torch
from common import SHAPES, random_llama, randomly_pruned

import saap
from saap.models.modeling_groupwise import use_groupwise


def bytes_of_halved_7b() -> float:
    """The weights of LLaMA-7B's shape pruned by half in int4, over those of the dense one in bfloat16."""
    dense = random_llama("llama-7b", "meta")
    halved: Any = randomly_pruned(dense, 0.5)
    use_groupwise(halved.model.layers, group_size=32)
    return saap.size_of(halved).weight_bytes / saap.size_of(dense).weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    if not on_gpu:
        print("no GPU is used: nothing here is claimed about one")
    shape = arguments.shape or ("llama-7b" if on_gpu else "smollm2-135m")
    dense = random_llama(shape, arguments.device)
    halved = saap.to_groupwise(randomly_pruned(dense, 0.5), 32, consume=True)
    models = {"dense, bfloat16": dense, "half, int4": halved}
    sizes = {name: saap.size_of(model) for name, model in models.items()}
    left = saap.use_int4_kernels(halved)
    lengths = {"prompt_tokens": arguments.prompt, "new_tokens": arguments.new, "runs": arguments.runs}
    rows = saap.compare_speed(models, sizes, **lengths)

    print(f"{shape}, batch 1, {arguments.prompt} + {arguments.new} tokens, {arguments.runs} runs, {rows[0].device}, "
          f"{rows[0].threads} threads; {left} int4 layers run without the kernel")  # fmt: skip
    print(f"{'':<18}{'tokens/s':>10}{'spread':>9}{'ratio':>8}{'eager':>9}{'weights':>12}")
    for row in rows:
        print(f"{row.variant:<18}{row.tokens_per_s:>10.1f}{row.tokens_per_s_spread:>9.0%}{row.decode_ratio:>7.2f}×"
              f"{row.eager_tokens_per_s:>9.1f}{row.weight_bytes / 1e6:>9.0f} MB")  # fmt: skip
    counted = bytes_of_halved_7b()
    print(f"LLaMA-7B's shape, half of it in int4: {counted:.3f}× the bytes of the dense one in bfloat16 (counted)")
    figures = {
        "int4_over_dense_decode": round(rows[1].decode_ratio, 3),
        "weights_over_dense": round(rows[1].weight_bytes / rows[0].weight_bytes, 4),
        "llama_7b_weights_over_dense": round(counted, 4),
        "shape": shape,
        "device": rows[0].device,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
