"""What the benchmarks share: models made on the spot, and memory as reported by the system or the GPU's allocator."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import saap
from saap.models import products

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "gemma-270m": {  # Gemma 3's sizes and vocabulary in Llama's form
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "vocab_size": 262144,
        "tie_word_embeddings": True,
    },
    "qwen-0.5b": {  # Qwen2.5's, likewise
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
}


def random_llama(shape: str, device: str) -> nn.Module:
    """A Llama of one of SHAPES in bfloat16 with random weights, for what does not depend on the values."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(dtype="bfloat16", **SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.tie_weights()
    return model


def randomly_pruned(dense: nn.Module, ratio: float) -> nn.Module:
    groups = saap.discover(dense)
    return saap.prune(dense, saap.select(np.random.default_rng(0).random(len(groups)), groups, ratio))


def embedded(folder: Path) -> Path:
    """The embedded SmolLM2-135M as a checkpoint in `folder`, which is returned."""
    from storage.keys import Fingerprints  # imported here: a bare machine with a GPU lacks these packages
    from tasks.model_source import EMBEDDED_MODEL, model_source

    saap.convert_gguf(model_source(EMBEDDED_MODEL, None, Fingerprints(folder)).path, folder)
    return folder


def where(device: str | torch.device) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def wait(device: str | torch.device) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def counts_processor_time(device: str | torch.device) -> bool:
    """Whether `clock` gives seconds of the processor: of one thread, for which other work on the machine is nothing."""
    return torch.device(device).type == "cpu" and torch.get_num_threads() == 1


def clock(device: str | torch.device) -> float:
    """Seconds, of a GPU with all that it was given done."""
    wait(device)
    return time.process_time() if counts_processor_time(device) else time.perf_counter()


def operations_of(action: Callable[[], object]) -> int:
    """Floating-point operations of an action's matrix products and, but for a CPU's own kernels, its attention."""
    from torch.utils.flop_counter import FlopCounterMode

    by_onednn = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=by_onednn if products.THERE else {}) as counter:
        action()
    return counter.get_total_flops()


def fastest_product(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str | torch.device) -> float:
    """Operations a second of one product of a linear layer: the best of 30."""
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    seconds = []
    for _ in range(30):
        start = clock(device)
        products.product(x, weight)
        seconds.append(clock(device) - start)
    return 2 * x.numel() * len(weight) / min(seconds)


def fastest_product_of(model: Any) -> float:
    """Operations a second of the fastest product of a model's MLP, for 1,024 tokens."""
    sizes = model.config.hidden_size, model.config.intermediate_size
    return fastest_product(1024, *sizes, model.dtype, model.device)


def last_line(main: Callable[[], None], arguments: list[str]) -> dict[str, Any]:
    """The JSON object that a benchmark, called with these arguments, prints last."""
    sys.argv[1:] = arguments
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main()
    figures: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return figures


def processor() -> str:
    """The processor's name, how many of its cores there are, and torch's threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def held(device: str | torch.device) -> int:
    """Bytes: on a GPU what its allocator has given out, on a CPU the resident memory of this process."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else _resident("VmRSS")


def most_held(action: Callable[[], object], device: str | torch.device) -> int:
    """The most bytes held while the action runs."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    action()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: memory on a CPU is measured on Linux only")
