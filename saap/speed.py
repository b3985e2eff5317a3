"""Decode and prefill speed, memory and size of model variants, alternating in one process."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from saap.groups import block_parts


@dataclass(frozen=True)
class Speed:
    """One variant. Medians of the timed runs; spread = interquartile range / median; ratios pair with the first.

    tokens_per_s: decode at batch 1 with a KV cache; prefill_tokens_per_s: the prompt alone. weight_bytes: what the
    parameters and buffers occupy as stored; peak_bytes: highest memory allocated on a GPU during the runs (CPU: NaN).
    macs_per_token: multiply-accumulates of the linear layers for one new token, attention over the prompt included.
    """

    variant: str
    tokens_per_s: float
    tokens_per_s_spread: float
    decode_ratio: float
    prefill_tokens_per_s: float
    prefill_ratio: float
    parameters: int
    weight_bytes: int
    peak_bytes: float
    macs_per_token: int
    dtype: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    runs: int


def compare_speed(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, "Size"],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    runs: int = 10,
    warmup: int = 3,
) -> list[Speed]:
    """Time every model in turn, `warmup` + `runs` times, greedy decoding of a forced length at batch 1.

    The first model is the one the ratios compare with; each run of a variant is paired with the same run of it.
    """
    decode: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    peak = dict.fromkeys(models, float("nan"))
    with tqdm(total=(warmup + runs) * len(models), desc="speed", unit="run") as bar:
        for run in range(warmup + runs):
            for name, model in models.items():
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                prompt_seconds, decode_seconds = _generate(model, prompt_tokens, new_tokens)
                if run >= warmup:
                    prefill[name].append(prompt_tokens / prompt_seconds)
                    decode[name].append((new_tokens - 1) / decode_seconds)
                if torch.cuda.is_available():
                    peak[name] = float(torch.cuda.max_memory_allocated())
                bar.update()
    base = next(iter(models))
    rows = []
    for name, model in models.items():
        rate = np.array(decode[name])
        low, middle, high = np.percentile(rate, [25, 50, 75])
        parameter = next(model.parameters())
        rows.append(
            Speed(
                variant=name,
                tokens_per_s=float(middle),
                tokens_per_s_spread=float((high - low) / middle),
                decode_ratio=float(np.median(rate / decode[base])),
                prefill_tokens_per_s=float(np.median(prefill[name])),
                prefill_ratio=float(np.median(np.array(prefill[name]) / prefill[base])),
                parameters=sizes[name].parameters,
                weight_bytes=sizes[name].weight_bytes,
                peak_bytes=peak[name],
                macs_per_token=sizes[name].macs_per_token(prompt_tokens),
                dtype=sizes[name].dtype,
                device=_device_name(parameter.device),
                threads=torch.get_num_threads(),
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                runs=runs,
            )
        )
    return rows


@torch.inference_mode()
def _generate(model: nn.Module, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for the other new_tokens − 1 tokens, timed apart."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(prompt_tokens, device=device)[None] % vocabulary
    _wait(device)
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    _wait(device)
    middle = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    _wait(device)
    return middle - start, time.perf_counter() - middle


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@dataclass(frozen=True)
class Size:
    """Logical parameters, true bytes and multiply-accumulates of a model."""

    parameters: int
    weight_bytes: int
    dtype: str
    linear_macs: int
    attention_width: int

    def macs_per_token(self, context: int) -> int:
        """Of one new token: every linear layer and the head once; scores and values over `context` positions."""
        return self.linear_macs + 2 * context * self.attention_width


def size_of(model: nn.Module) -> Size:
    """Sizes of a model as loaded, before any layer is repacked for speed.

    An int4 weight counts as one parameter; its scales and zeros count as bytes, not as parameters.
    """
    from saap.modeling import GroupwiseLinear

    parameters = {id(p): p for p in model.parameters()}
    buffers = {id(b): b for n, b in model.named_buffers() if not n.endswith("inv_freq")}
    count = sum(p.numel() for p in parameters.values())
    macs = model.get_input_embeddings().weight.numel()  # type: ignore[operator]  # the head has the embedding's shape
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for module in model.modules():
        if isinstance(module, GroupwiseLinear):
            count += module.in_features * module.out_features
            macs += module.in_features * module.out_features
            dtype = "int4"
        elif isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
            macs += module.weight.numel()
    width = sum(
        linear.in_features for block in block_parts(model) for part, linear in block["attention"] if part.axis == 1
    )
    stored = [*parameters.values(), *buffers.values()]
    return Size(count, sum(t.numel() * t.element_size() for t in stored), dtype, macs, width)
