"""Decode and prefill speed, memory and size of model variants, alternating in one process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from saap.evaluation.joined import joined_kernels
from saap.evaluation.sizes import Size
from saap.models.logits import rows_for_the_head
from saap.progress import tqdm

T = TypeVar("T")

WARM_STEPS = 3  # before a graph is captured
EAGER_STEPS = 16  # decoding steps timed without a graph: each takes the same, over a cache of one size


@dataclass(frozen=True)
class Speed:
    """One variant. Medians of the timed runs; spread = interquartile range / median; ratios pair with the first.

    tokens_per_s: decode with a KV cache, all rows of the batch; prefill_tokens_per_s: the prompt alone. On a GPU
    decoding replays a CUDA graph of joined kernels over a static cache, and eager_tokens_per_s is the same without
    graph and joining; on a CPU both are the plain loop. active_parameters: those that one token passes (`Size.active`).
    weight_bytes: what the parameters and buffers occupy as stored; peak_bytes: those, and the most that was allocated
    beside them on a GPU (CPU: NaN). macs_per_token: multiply-accumulates of the linear layers for one new token,
    attention over the prompt included.
    """

    variant: str
    tokens_per_s: float
    tokens_per_s_spread: float
    decode_ratio: float
    eager_tokens_per_s: float
    prefill_tokens_per_s: float
    prefill_ratio: float
    parameters: int
    active_parameters: int
    weight_bytes: int
    peak_bytes: float
    macs_per_token: int
    dtype: str
    device: str
    threads: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    runs: int


def compare_speed(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, Size],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    runs: int = 10,
    warmup: int = 3,
    batch_size: int = 1,
) -> list[Speed]:
    """Time every model in turn, all on one device, `warmup` + `runs` times, greedy decoding of a forced length.

    The first model is the one the ratios compare with; each run of a variant is paired with the same run of it.
    """
    lengths: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
    first = next(iter(models.values()))
    with torch.cuda.device_of(next(first.parameters())):  # streams, graphs and counters are the current device's
        decoders = {name: decoder_of(model, **lengths) for name, model in models.items()}
        timings = time_decoding({name: d.run for name, d in decoders.items()}, runs=runs, warmup=warmup, **lengths)
    return [
        Speed(
            variant=name,
            **timings[name],
            parameters=sizes[name].parameters,
            active_parameters=sizes[name].active,
            weight_bytes=sizes[name].weight_bytes,
            peak_bytes=sizes[name].weight_bytes + decoders[name].extra_bytes,
            macs_per_token=sizes[name].macs_per_token(prompt_tokens),
            dtype=sizes[name].dtype,
            device=_device_name(next(model.parameters()).device),
        )
        for name, model in models.items()
    ]


def time_decoding(
    actions: Mapping[str, Callable[[], tuple[float, float, float]]],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    runs: int,
    warmup: int,
    desc: str = "speed",
) -> dict[str, dict[str, Any]]:
    """The fields of `Speed` that come from timing, for each action.

    An action generates, and returns the seconds it took: for the prompt, for the other new_tokens − 1 tokens, and for
    these without a graph.
    """
    tokens = np.array([prompt_tokens, new_tokens - 1, new_tokens - 1]) * batch_size
    found = in_turn(actions, runs, warmup, desc)
    rates = {name: (tokens / np.array(seconds)).T for name, seconds in found.items()}
    base_prefill, base_decode, _ = next(iter(rates.values()))
    timings = {}
    for name, (prefill, decode, eager) in rates.items():
        low, middle, high = np.percentile(decode, [25, 50, 75])
        timings[name] = {
            "tokens_per_s": float(middle),
            "tokens_per_s_spread": float((high - low) / middle),
            "decode_ratio": float(np.median(decode / base_decode)),
            "eager_tokens_per_s": float(np.median(eager)),
            "prefill_tokens_per_s": float(np.median(prefill)),
            "prefill_ratio": float(np.median(prefill / base_prefill)),
            "threads": torch.get_num_threads(),
            "batch_size": batch_size,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
        }
    return timings


def in_turn(actions: Mapping[str, Callable[[], T]], runs: int, warmup: int, desc: str) -> dict[str, list[T]]:
    """What each action returned in `runs` rounds, in each of which all are called once; the warm-up is not kept."""
    found: dict[str, list[T]] = {name: [] for name in actions}
    with tqdm(total=(warmup + runs) * len(actions), desc=desc, unit="run") as bar:
        for run in range(warmup + runs):
            for name, action in actions.items():
                result = action()
                if run >= warmup:
                    found[name].append(result)
                bar.update()
    return found


def decoder_of(model: nn.Module, batch_size: int, prompt_tokens: int, new_tokens: int) -> "Decoder":
    """How a model is timed on the device it is on."""
    kind = GraphDecoder if next(model.parameters()).is_cuda else Decoder
    return kind(model, batch_size, prompt_tokens, new_tokens)


class Decoder:
    """Times one model on a CPU: a prompt of `prompt_tokens`, then new_tokens − 1 tokens greedily, one at a time."""

    extra_bytes = float("nan")

    def __init__(self, model: nn.Module, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        self.model, self.steps = model, new_tokens - 1
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        device = next(model.parameters()).device
        self.prompt = (torch.arange(prompt_tokens, device=device) % vocabulary).repeat(batch_size, 1)

    @torch.inference_mode()
    def run(self) -> tuple[float, float, float]:
        """Seconds for the prompt, for decoding, and for decoding without a graph (here the same)."""
        start = time.perf_counter()
        with rows_for_the_head(self.model):
            out = self.model(self.prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(self.steps):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode = time.perf_counter() - middle
        return middle - start, decode, decode


class GraphDecoder(Decoder):
    """Times one model on a GPU by CUDA events, over a static cache: decoding replays the graph of one step.

    Launching several hundred kernels a token takes longer than a small model's arithmetic, and would hide it. In the
    graph the small ones are joined (`joined_kernels`), as a serving engine does.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        from transformers import StaticCache

        super().__init__(model, batch_size, prompt_tokens, new_tokens)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        room = prompt_tokens + max(new_tokens, WARM_STEPS)
        self.cache = StaticCache(config=model.config, max_cache_len=room)  # type: ignore[arg-type]
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=self.prompt.device)
        self._prefill()
        side = torch.cuda.Stream()  # capturing needs a few steps on a stream that is not the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), joined_kernels(model):
            for _ in range(WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self._prefill()
        with joined_kernels(model), torch.cuda.graph(self.graph):
            self._step()
        self._held = torch.cuda.memory_allocated() - before
        self.extra_bytes = float(torch.cuda.max_memory_allocated() - before)

    def _prefill(self) -> None:
        self.cache.reset()
        with rows_for_the_head(self.model):
            out = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def _step(self) -> None:
        out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    @torch.inference_mode()
    def run(self) -> tuple[float, float, float]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill = _event_seconds(self._prefill, 1)
        decode = _event_seconds(self.graph.replay, self.steps)
        self._prefill()
        few = min(self.steps, EAGER_STEPS)
        eager = _event_seconds(self._step, few) * self.steps / few
        self.extra_bytes = max(self.extra_bytes, float(self._held + torch.cuda.max_memory_allocated() - before))
        return prefill, decode, eager


def _event_seconds(action: Callable[[], None], times: int) -> float:
    """Seconds on the GPU between the first and the last kernel of `times` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
