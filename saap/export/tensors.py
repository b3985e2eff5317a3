"""The tensors of a checkpoint as a GGUF file has them: names, order of rows, types, Q4_1 blocks."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open

from saap.errors import SaapError
from saap.models.modeling_groupwise import GroupwiseLinear
from saap.models.validation import tensor_shapes, weight_files

BLOCK = 32  # weights of a row that share a scale and a minimum in Q4_1
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `read` gives its array, of `shape` (bytes for Q4_1) and `dtype`."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    unpacked: bool = False

    @property
    def dtype(self) -> np.dtype:
        numpy = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        return np.dtype(numpy.get(self.kind, np.uint8))

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Stored:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.used = {"lm_head.weight"}  # a tied head may be there and is never read
        for file in weight_files(folder):
            shapes = tensor_shapes([file])
            self.shapes |= shapes
            self.places |= dict.fromkeys(shapes, file)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def expect(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises SaapError when the checkpoint has no such tensor of that shape."""
        self.used.add(name)
        if self.shapes.get(name) != expected:
            found = self.shapes.get(name, "missing")
            raise SaapError(
                f"the tensors in {self.folder} do not fit its config.json: {name} is {found}, not {expected}"
            )

    def all_used(self) -> None:
        """Raises SaapError when the checkpoint has a tensor that was never read: it would be lost."""
        lost = [n for n in self.shapes if n not in self.used and not n.endswith("rotary_emb.inv_freq")]
        if lost:
            raise SaapError(f"GGUF export has no place for {sorted(lost)[0]} ({len(lost)} such tensors)")

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.places[name], framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
            return tensor


def gguf_tensors(model: Any, stored: Stored, floats: GGMLQuantizationType) -> Iterator[Tensor]:
    """The tensors of a checkpoint; `model` is the empty one that its config describes."""
    config, plain = model.config, GGMLQuantizationType.F32
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield _float(stored, "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden), floats)
    yield _float(stored, "model.norm.weight", "output_norm.weight", (hidden,), plain)
    if not config.tie_word_embeddings:
        yield _float(stored, "lm_head.weight", "output.weight", (vocabulary, hidden), floats)
    factors = _rotary_factors(config)
    if factors is not None:
        yield Tensor("rope_freqs.weight", plain, factors.shape, lambda: factors)
    for layer, (block, own) in enumerate(zip(model.model.layers, config.per_layer_config, strict=True)):
        for norm, name in NORMS.items():
            yield _float(stored, f"model.layers.{layer}.{norm}.weight", f"blk.{layer}.{name}.weight", (hidden,), plain)
        for path, name in LINEARS.items():
            linear = block.get_submodule(path)
            rotated = {"attn_q": own.num_attention_heads, "attn_k": own.num_key_value_heads}.get(name)
            source, target = f"model.layers.{layer}.{path}", f"blk.{layer}.{name}"
            coded = isinstance(linear, GroupwiseLinear)
            # channels are padded: what they multiply is zero, and llama-quantize wants whole blocks
            pad = (name in ("ffn_gate", "ffn_up"), name == "ffn_down")
            if coded:
                yield _coded(stored, source, f"{target}.weight", linear, pad, floats, rotated)
            else:
                shape = tuple(linear.weight.shape)
                yield _float(stored, f"{source}.weight", f"{target}.weight", shape, floats, rotated, pad)
            if f"{source}.bias" in stored:
                yield _float(
                    stored, f"{source}.bias", f"{target}.bias", (linear.out_features,), plain, rotated, pad[:1]
                )


def _float(
    stored: Stored,
    source: str,
    name: str,
    shape: tuple[int, ...],
    kind: GGMLQuantizationType,
    rotated: int | None = None,
    pad: tuple[bool, ...] = (),
) -> Tensor:
    stored.expect(source, shape)
    whole = tuple(padded(n) if wanted else n for n, wanted in zip_longest(shape, pad, fillvalue=False))

    def read() -> np.ndarray:
        value = _interleave(stored.read(source).float().numpy(), rotated)
        return _as_float(np.pad(value, [(0, b - a) for a, b in zip(shape, whole, strict=True)]), kind, name)

    return Tensor(name, kind, whole, read)


def _coded(
    stored: Stored,
    source: str,
    name: str,
    empty: GroupwiseLinear,
    pad: tuple[bool, bool],
    floats: GGMLQuantizationType,
    rotated: int | None,
) -> Tensor:
    shape = (empty.out_features, empty.in_features)
    rows, columns = (padded(n) if wanted else n for n, wanted in zip(shape, pad, strict=True))
    buffers = {part: tuple(buffer.shape) for part, buffer in empty.named_buffers()}
    for part, expected in buffers.items():
        stored.expect(f"{source}.{part}", expected)

    def linear() -> GroupwiseLinear:
        layer = copy.deepcopy(empty)
        for part in buffers:
            setattr(layer, part, stored.read(f"{source}.{part}"))
        return layer

    if empty.bits != 4 or empty.group_size % BLOCK or columns % BLOCK:

        def weight() -> np.ndarray:
            whole = _pad(linear().weight().numpy().T, columns).T
            return _as_float(_pad(_interleave(whole, rotated), rows), floats, name)

        return Tensor(name, floats, (rows, columns), weight, unpacked=True)

    def blocks() -> np.ndarray:
        layer = linear()
        codes = _pad(layer.unpacked().numpy().T, columns).T
        scale, zero = (
            np.repeat(getattr(layer, part).numpy(), empty.group_size // BLOCK, 1)[:, : columns // BLOCK]
            for part in ("scale", "zero")
        )
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise SaapError(f"{name} holds scales that are not finite")
        return _pad(_interleave(q4_1(codes, scale, zero), rotated), rows)

    return Tensor(name, GGMLQuantizationType.Q4_1, (rows, columns // BLOCK * 20), blocks)


def q4_1(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Q4_1 blocks, uint8 (out, in/32·20), of codes uint8 (out, in), scale and zero float16 (out, in/32).

    A block is a float16 scale and minimum, then 16 bytes: byte j holds code j in its low half, j + 16 in its high half.
    """
    out, width = codes.shape
    halves = codes.reshape(out, width // BLOCK, 2, BLOCK // 2)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    heads = np.stack([scale, zero], -1).astype(np.float16).view(np.uint8).reshape(out, -1, 4)
    return np.concatenate([heads, packed], -1).reshape(out, -1)


def _interleave(value: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them: pairs (2i, 2i+1), where transformers has (i, i + d/2)."""
    if heads is None:
        return value
    return value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def _pad(value: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(value, [(0, rows - len(value))] + [(0, 0)] * (value.ndim - 1))


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _as_float(value: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    if not np.isfinite(value).all():
        raise SaapError(f"{name} holds values that are not finite")
    if kind == GGMLQuantizationType.F32:
        return np.ascontiguousarray(value, np.float32)
    if np.abs(value).max() > np.finfo(np.float16).max:
        raise SaapError(f"{name} does not fit float16: export with floats f32")
    return np.ascontiguousarray(value, np.float16)


def _rotary_factors(config: Any) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by (Llama 3's and linear scaling), or None."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    size = head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    factors: np.ndarray = (plain / LlamaRotaryEmbedding(config).inv_freq).numpy()
    return factors


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
