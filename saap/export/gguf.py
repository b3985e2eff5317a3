"""GGUF for llama.cpp: uneven layers through its `deci` architecture, our int4 as Q4_1, bit for bit."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from tqdm.auto import tqdm

from saap.checkpoint import load_config, load_tokenizer
from saap.errors import SaapError
from saap.export.vocabulary import write_vocabulary
from saap.modeling import GroupwiseLinear
from saap.untrusted import check_sizes, tensor_shapes, weight_files

BLOCK = 32  # weights of a row that share a scale and a minimum in Q4_1
FLOATS = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16}
FILE_TYPES = {GGMLQuantizationType.F32: 0, GGMLQuantizationType.F16: 1, GGMLQuantizationType.Q4_1: 3}
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
class Exported:
    """What was written: bytes, tensors by type, and the int4 tensors that had to become floats."""

    bytes: int
    tensors: dict[str, int]
    unpacked: tuple[str, ...]


def export_gguf(folder: str | Path, file: str | Path, *, floats: str = "f16") -> Exported:
    """Write the checkpoint in `folder` as one GGUF file, tokenizer included.

    Float tensors become `floats` ('f16' or 'f32'), norms and biases float32. int4 layers become Q4_1 blocks of the same
    codes, scales and zeros: nothing is quantised again. Their MLP channels are padded with zeros to a multiple of 32,
    which changes no output. What Q4_1 cannot hold (other bits than 4, groups that are no multiple of 32, other inputs
    that 32 does not divide) is written as `floats` of the same values.

    The file appears whole or not at all; tensors are read one at a time. Raises SaapError for a model, tokenizer or
    value that llama.cpp or the format cannot hold.
    """
    folder, file = Path(folder), Path(file)
    if floats not in FLOATS:
        raise SaapError(f"floats must be one of {', '.join(FLOATS)}, got '{floats}'")
    if not file.parent.is_dir():
        raise SaapError(f"there is no folder {file.parent} to write {file.name} in")
    config = load_config(folder)
    check_config(config)
    check_sizes(config, folder)
    tensors = list(_tensors(config, _Stored(folder), FLOATS[floats]))
    draft = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(None, "deci")
    try:
        packed = any(tensor.kind == GGMLQuantizationType.Q4_1 for tensor in tensors)
        kind = GGMLQuantizationType.Q4_1 if packed else FLOATS[floats]
        _write_settings(writer, config, kind, file.stem)
        write_vocabulary(writer, load_tokenizer(folder), config.vocab_size)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=sum(t.bytes for t in tensors), desc="gguf", unit="B", unit_scale=True) as bar:
            for tensor in tensors:
                writer.write_tensor_data(tensor.read())
                bar.update(tensor.bytes)
        writer.close()
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(file)
    except OSError as error:
        raise SaapError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        writer.close()
        draft.unlink(missing_ok=True)
    kinds = [tensor.kind.name for tensor in tensors]
    unpacked = tuple(tensor.name for tensor in tensors if tensor.unpacked)
    return Exported(file.stat().st_size, {kind: kinds.count(kind) for kind in sorted(set(kinds))}, unpacked)


def check_config(config: Any) -> None:
    """Raises SaapError for a model that llama.cpp's deci architecture cannot run."""
    kind = config.model_type.removeprefix("saap_")
    if kind not in ("llama", "mistral", "qwen2"):
        raise SaapError(
            f"llama.cpp has no architecture for an uneven {kind}: GGUF export knows llama, mistral and qwen2"
        )
    if config.hidden_act != "silu":
        raise SaapError(f"llama.cpp's deci architecture computes silu, this model {config.hidden_act}")
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise SaapError(f"GGUF export cannot express {config.rope_parameters['rope_type']} rotary positions")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise SaapError("GGUF export cannot express rotary positions on a part of the head")
    for layer, own in enumerate(config.per_layer_config):
        heads, shared = own.num_attention_heads, own.num_key_value_heads
        if min(heads, shared, own.intermediate_size) < 1 or heads % shared:
            raise SaapError(f"layer {layer} has {heads} query and {shared} KV heads, {own.intermediate_size} channels")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _form(config: Any) -> dict[str, int] | None:
    """How the linear layers are stored in few bits, or None for floats."""
    form: dict[str, int] | None = getattr(config, "groupwise", None)
    return form


def _write_settings(writer: gguf.GGUFWriter, config: Any, kind: GGMLQuantizationType, name: str) -> None:
    layers, size = list(config.per_layer_config), _head_size(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    # deci knows no sliding window: within one, it computes the same
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    coded = _form(config) is not None
    writer.add_feed_forward_length([_padded(c.intermediate_size) if coded else c.intermediate_size for c in layers])
    writer.add_head_count([c.num_attention_heads for c in layers])
    writer.add_head_count_kv([c.num_key_value_heads for c in layers])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


@dataclass(frozen=True)
class _Tensor:
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


class _Stored:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder):
            shapes = tensor_shapes([file])
            self.shapes |= shapes
            self.places |= dict.fromkeys(shapes, file)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, expected: tuple[int, ...]) -> tuple[int, ...]:
        if self.shapes.get(name) != expected:
            found = self.shapes.get(name, "missing")
            raise SaapError(
                f"the tensors in {self.folder} do not fit its config.json: {name} is {found}, not {expected}"
            )
        return expected

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.places[name], framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
            return tensor


def _tensors(config: Any, stored: _Stored, floats: GGMLQuantizationType) -> Iterator[_Tensor]:
    hidden, vocabulary, size = config.hidden_size, config.vocab_size, _head_size(config)
    plain, coded = GGMLQuantizationType.F32, _form(config)
    yield _float(stored, "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden), floats)
    yield _float(stored, "model.norm.weight", "output_norm.weight", (hidden,), plain)
    if not config.tie_word_embeddings:
        yield _float(stored, "lm_head.weight", "output.weight", (vocabulary, hidden), floats)
    factors = _rotary_factors(config)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", plain, factors.shape, lambda: factors)
    for layer, own in enumerate(config.per_layer_config):
        queries, keys, channels = own.num_attention_heads, own.num_key_value_heads, own.intermediate_size
        for norm, name in NORMS.items():
            yield _float(stored, f"model.layers.{layer}.{norm}.weight", f"blk.{layer}.{name}.weight", (hidden,), plain)
        sizes = {
            "attn_q": (queries * size, hidden),
            "attn_k": (keys * size, hidden),
            "attn_v": (keys * size, hidden),
            "attn_output": (hidden, queries * size),
            "ffn_gate": (channels, hidden),
            "ffn_up": (channels, hidden),
            "ffn_down": (hidden, channels),
        }
        for path, name in LINEARS.items():
            rotated = {"attn_q": queries, "attn_k": keys}.get(name)
            source, target = f"model.layers.{layer}.{path}", f"blk.{layer}.{name}"
            # channels may be padded: what they multiply is zero
            pad = (coded is not None and name in ("ffn_gate", "ffn_up"), coded is not None and name == "ffn_down")
            if coded is None:
                yield _float(stored, f"{source}.weight", f"{target}.weight", sizes[name], floats, rotated)
            else:
                yield _coded(stored, source, f"{target}.weight", sizes[name], coded, pad, floats, rotated)
            if f"{source}.bias" in stored:
                yield _float(stored, f"{source}.bias", f"{target}.bias", sizes[name][:1], plain, rotated, pad[0])


def _float(
    stored: _Stored,
    source: str,
    name: str,
    shape: tuple[int, ...],
    kind: GGMLQuantizationType,
    rotated: int | None = None,
    pad: bool = False,
) -> _Tensor:
    stored.shape(source, shape)
    rows = _padded(shape[0]) if pad else shape[0]

    def read() -> np.ndarray:
        value = _pad(_interleave(stored.read(source).float().numpy(), rotated), rows)
        return _as_float(value, kind, name)

    return _Tensor(name, kind, (rows, *shape[1:]), read)


def _coded(
    stored: _Stored,
    source: str,
    name: str,
    shape: tuple[int, int],
    form: dict[str, int],
    pad: tuple[bool, bool],
    floats: GGMLQuantizationType,
    rotated: int | None,
) -> _Tensor:
    (out, width), bits = shape, form.get("bits", 4)
    size = -(-width // form["groups"]) if form.get("groups") else form["group_size"]
    rows, columns = (_padded(n) if wanted else n for n, wanted in zip(shape, pad, strict=True))
    groups = -(-width // size)
    for part, expected in (("codes", (out, -(-width * bits // 8))), ("scale", (out, groups)), ("zero", (out, groups))):
        stored.shape(f"{source}.{part}", expected)

    def linear() -> GroupwiseLinear:
        layer = GroupwiseLinear(width, out, size, bits=bits)
        for part in ("codes", "scale", "zero"):
            setattr(layer, part, stored.read(f"{source}.{part}"))
        return layer

    if bits != 4 or size % BLOCK or columns % BLOCK:

        def weight() -> np.ndarray:
            whole = _pad(linear().weight().numpy().T, columns).T
            return _as_float(_pad(_interleave(whole, rotated), rows), floats, name)

        return _Tensor(name, floats, (rows, columns), weight, unpacked=True)

    def blocks() -> np.ndarray:
        layer = linear()
        codes = _pad(layer.unpacked().numpy().T, columns).T
        scale, zero = (
            np.repeat(getattr(layer, part).numpy(), size // BLOCK, 1)[:, : columns // BLOCK]
            for part in ("scale", "zero")
        )
        return _pad(_interleave(q4_1(codes, scale, zero), rotated), rows)

    return _Tensor(name, GGMLQuantizationType.Q4_1, (rows, columns // BLOCK * 20), blocks)


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


def _padded(size: int) -> int:
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
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    factors: np.ndarray = (plain / LlamaRotaryEmbedding(config).inv_freq).numpy()
    return factors
