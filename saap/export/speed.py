"""Decode and prefill speed of checkpoints in llama.cpp, alternating in one process."""

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from saap.speed import Size, Speed


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
    decode: dict[str, list[float]] = {name: [] for name in folders}
    prefill: dict[str, list[float]] = {name: [] for name in folders}
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        done, models = {}, {}
        for name, folder in folders.items():
            file = Path(work) / f"{name}.gguf"
            done[name] = export_gguf(folder, file)
            models[name] = stack.enter_context(LlamaCpp(file, context=prompt_tokens + new_tokens, threads=threads))
        for run in tqdm(range(warmup + runs), desc="speed in llama.cpp", unit="run"):
            for name, model in models.items():
                prompt_seconds, decode_seconds = _generate(model, prompt_tokens, new_tokens)
                if run >= warmup:
                    prefill[name].append(prompt_tokens / prompt_seconds)
                    decode[name].append((new_tokens - 1) / decode_seconds)
    base = next(iter(folders))
    rows = []
    for name in folders:
        low, middle, high = np.percentile(decode[name], [25, 50, 75])
        rows.append(
            Speed(
                variant=f"{name} in llama.cpp",
                tokens_per_s=float(middle),
                tokens_per_s_spread=float((high - low) / middle),
                decode_ratio=float(np.median(np.array(decode[name]) / decode[base])),
                eager_tokens_per_s=float(middle),
                prefill_tokens_per_s=float(np.median(prefill[name])),
                prefill_ratio=float(np.median(np.array(prefill[name]) / prefill[base])),
                parameters=sizes[name].parameters,
                weight_bytes=done[name].bytes,
                peak_bytes=float("nan"),
                macs_per_token=sizes[name].macs_per_token(prompt_tokens),
                dtype="Q4_1" if "Q4_1" in done[name].tensors else "F16",
                device="cpu",
                threads=threads,
                batch_size=1,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                runs=runs,
            )
        )
    return rows


def _generate(model: LlamaCpp, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for the other new_tokens − 1 tokens, timed apart."""
    model.clear()
    start = time.perf_counter()
    token = int(model.feed([n % model.vocabulary for n in range(prompt_tokens)], last_only=True)[0].argmax())
    middle = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(model.feed([token])[0].argmax())
    return middle - start, time.perf_counter() - middle
