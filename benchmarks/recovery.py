"""What the three recovery recipes cost: training tokens a second and peak memory, on the same pruned model.

    python benchmarks/recovery.py                     # SmolLM2-135M's shape; on a GPU, Llama-3.2-1B's
    python benchmarks/recovery.py --shape llama-1b --length 512

Random weights in bfloat16, pruned by 20 % with random scores: speed and memory do not depend on the values. One
optimiser step of each recipe in turn (loss on half of the tokens, as on Alpaca), after one unmeasured; the peak of each
is measured in a process of its own, above what that process held before it made the model. `plain_qlora` is QLoRA as
peft and bitsandbytes alone train it, through transformers' own norms, MLPs and plain attention; ours keep less for the
backward pass (`saap/models/lean.py`). The bound of a step is the operations of its matrix products at the speed of the
fastest single product here. Prints a table and, as its last line, one JSON object.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from common import SHAPES, clock, fastest_product, held, most_held, operations_of, random_llama, randomly_pruned, where

from saap.evaluation.speed import in_turn

RECIPES = ("groupwise", "lora", "qlora", "plain_qlora")


def steps_of(name: str, arguments: argparse.Namespace) -> Callable[[], float]:
    """A function that makes one optimiser step of a recipe and returns its seconds."""
    from saap import RECIPES
    from saap.models.lean import attending, fastest_attention, lean
    from saap.recovery.loss import Student
    from saap.recovery.recover import PLAIN_UP_TO

    device, plain = arguments.device, name.startswith("plain_")
    model = RECIPES[name.removeprefix("plain_")](rank=arguments.rank).prepare(
        randomly_pruned(random_llama(arguments.shape, device), 0.2), torch.zeros(1, 8, dtype=torch.int64)
    )
    attention = fastest_attention(model, device, torch.bfloat16, arguments.length, PLAIN_UP_TO)
    if plain and device == "cpu":
        attention = "eager"  # there faster than transformers' default
    student = Student(model).train()
    learned = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.length), device=device)
    labels = torch.where(torch.arange(arguments.length, device=device) < arguments.length // 2, -100, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> float:
        start = clock(device)
        with (
            nullcontext() if plain else lean(model),
            attending(model, attention),
            torch.autocast(device, torch.bfloat16),
        ):
            loss = student(**batch)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return clock(device) - start

    step.learned = sum(p.numel() for p in learned)  # type: ignore[attr-defined]
    return step


def peak_of(name: str, arguments: argparse.Namespace) -> int:
    """Peak bytes of two optimiser steps, weights included, above what was held before the model was made."""
    small = "tiny" if arguments.shape == "tiny" else "smollm2-135m"
    steps_of(name, argparse.Namespace(**(vars(arguments) | {"shape": small})))()  # imports, threads, buffers
    gc.collect()
    before = held(arguments.device)
    step = steps_of(name, arguments)
    gc.collect()
    return most_held(lambda: (step(), step()), arguments.device) - before


def peak_in_a_process(name: str, arguments: argparse.Namespace) -> int:
    """`peak_of` a recipe: on a GPU, whose allocator counts exactly, in this process."""
    if arguments.device.startswith("cuda"):
        peak = peak_of(name, arguments)
        gc.collect()
        torch.cuda.empty_cache()
        return peak
    # a fixed threshold: large tensors go back to the system when they are freed, so that the peak is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, __file__, *sys.argv[1:], "--shape", arguments.shape, "--peak-of", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or ("llama-1b" if arguments.device == "cuda" else "smollm2-135m")
    if arguments.peak_of:
        print(peak_of(arguments.peak_of, arguments))
        return

    names = arguments.recipes
    peaks = {name: peak_in_a_process(name, arguments) for name in names}
    steps = {name: steps_of(name, arguments) for name in names}
    seconds = in_turn(steps, arguments.repeats, 1, "training steps")

    tokens = arguments.batch * arguments.length
    place = where(arguments.device)
    print(f"{arguments.shape}, 20 % pruned, {arguments.batch} × {arguments.length} tokens a step, bfloat16, on {place}")
    if arguments.device == "cpu":
        print("no GPU here: nothing is claimed about one")
    sizes = SHAPES[arguments.shape]
    speed = fastest_product(tokens, sizes["hidden_size"], sizes["intermediate_size"], torch.bfloat16, arguments.device)
    bounds = {name: operations_of(steps[name]) / speed for name in names}
    print(f"the fastest product: {speed / 1e9:.0f} GFLOP/s")
    print(f"{'recipe':<12}{'tokens/s':>10}{'spread':>9}{'of bound':>10}{'peak MB':>10}{'trained':>10}")
    for name in names:
        low, middle, high = np.percentile(seconds[name], [25, 50, 75])
        learned = steps[name].learned / 1e6  # type: ignore[attr-defined]
        print(
            f"{name:<12}{tokens / middle:>10.0f}{(high - low) / middle:>9.0%}{bounds[name] / middle:>10.0%}"
            f"{peaks[name] / 1e6:>10.0f}{learned:>9.1f}M"
        )

    def faster(than: str) -> float:
        return float(np.median(np.array(seconds[than]) / np.array(seconds["groupwise"])))

    figures = {
        **{f"groupwise_over_{name}_speed": round(faster(name), 3) for name in names if name != "groupwise"},
        "tokens_per_s": {name: round(tokens / float(np.median(seconds[name]))) for name in names},
        "of_bound": {name: round(bounds[name] / float(np.median(seconds[name])), 3) for name in names},
        "groupwise_peak_smallest": int(peaks["groupwise"] == min(peaks.values())),
        "peak_bytes": peaks,
        "device": place,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
