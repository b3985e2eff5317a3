"""GGUF for llama.cpp: uneven layers through its `deci` architecture, our int4 as Q4_1, bit for bit."""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType

from saap.errors import SaapError
from saap.export.tensors import Stored, gguf_tensors, head_size, padded
from saap.export.uniform import STOCK
from saap.export.vocabulary import write_vocabulary
from saap.models.checkpoint import load_config
from saap.models.tokenizer import load_tokenizer
from saap.models.validation import check_sizes
from saap.progress import tqdm

FLOATS = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16}
FILE_TYPES = {GGMLQuantizationType.F32: 0, GGMLQuantizationType.F16: 1, GGMLQuantizationType.Q4_1: 3}


@dataclass(frozen=True)
class Exported:
    """What was written: bytes, tensors by type, and the int4 tensors that had to become floats."""

    bytes: int
    tensors: dict[str, int]
    unpacked: tuple[str, ...]


def export_gguf(folder: str | Path, file: str | Path, *, floats: str = "f16") -> Exported:
    """Write the checkpoint in `folder` as one GGUF file, tokenizer included.

    Float tensors become `floats` ('f16' or 'f32'), norms and biases float32. int4 layers become Q4_1 blocks of the same
    codes, scales and zeros: nothing is quantised again. MLP channels are padded with zeros to a multiple of 32, which
    changes no output and lets llama-quantize make every type. What Q4_1 cannot hold (other bits than 4, groups that are
    no multiple of 32, other inputs that 32 does not divide) is written as floats, rounded to `floats`.

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
    model = check_sizes(config, folder)
    stored = Stored(folder)
    tensors = list(gguf_tensors(model, stored, FLOATS[floats]))
    stored.all_used()
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
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
        remedy = ": make its layers equal with `saap export uniform` and use llama.cpp's own converter"
        raise SaapError(
            f"llama.cpp has no architecture for an uneven {kind} (GGUF export knows llama, mistral and qwen2)"
            + (remedy if kind in STOCK else "")
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


def _write_settings(writer: gguf.GGUFWriter, config: Any, kind: GGMLQuantizationType, name: str) -> None:
    layers, size = list(config.per_layer_config), head_size(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    # deci knows no sliding window: within one, it computes the same
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([padded(c.intermediate_size) for c in layers])
    writer.add_head_count([c.num_attention_heads for c in layers])
    writer.add_head_count_kv([c.num_key_value_heads for c in layers])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
