"""Decode and prefill speed of checkpoints in llama.cpp, alternating in one process."""

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saap.evaluation.sizes import Size
from saap.evaluation.speed import Speed, time_decoding
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp


def llama_cpp_speed(
    folders: Mapping[str, str | Path],
    sizes: Mapping[str, Size],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    runs: int = 10,
    warmup: int = 3,
) -> list[Speed]:
    """As `saap.compare_speed`, but each checkpoint as a GGUF file (floats F16, int4 Q4_1) in llama.cpp on the CPU.

    Variants are called '<name> in llama.cpp'; ratios pair with the first of them. weight_bytes is the file's size.
    """
    lengths: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        done, actions = {}, {}
        for name, folder in folders.items():
            file = Path(work) / f"{name}.gguf"
            done[name] = export_gguf(folder, file)
            model = stack.enter_context(LlamaCpp(file, context=prompt_tokens + new_tokens, threads=threads))
            actions[name] = partial(_generate, model, **lengths)
        timings = time_decoding(actions, runs=runs, warmup=warmup, batch_size=1, desc="speed in llama.cpp", **lengths)
    return [
        Speed(
            variant=f"{name} in llama.cpp",
            **timings[name],
            parameters=sizes[name].parameters,
            active_parameters=sizes[name].active,
            weight_bytes=done[name].bytes,
            peak_bytes=float("nan"),
            macs_per_token=sizes[name].macs_per_token(prompt_tokens),
            dtype="Q4_1" if "Q4_1" in done[name].tensors else "F16",
            device="cpu",
        )
        for name in folders
    ]


def _generate(model: LlamaCpp, prompt_tokens: int, new_tokens: int) -> tuple[float, float, float]:
    """As `Decoder.run`."""
    model.clear()
    start = time.perf_counter()
    token = int(model.feed([n % model.vocabulary for n in range(prompt_tokens)], last_only=True)[0].argmax())
    middle = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(model.feed([token])[0].argmax())
    decode = time.perf_counter() - middle
    return middle - start, decode, decode
