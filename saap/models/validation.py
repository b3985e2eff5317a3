"""Refuses, before transformers opens it, what a stranger's checkpoint could do to its reader.

Code in the folder is never run and pickles are never read. Checked here are the quieter ways: sizes that fill the
memory, file names that leave the folder, and fields of config.json that make transformers fetch something else.
"""

import copy
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saap.errors import SaapError, first_line

MOST_BLOCKS = 4096
FLOATS = ("F64", "F32", "BF16", "F16")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight")


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises SaapError for what is no JSON object, or asks for what we do not load."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaapError(f"cannot read {folder}/config.json: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise SaapError(f"{folder}/config.json is no JSON object")
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise SaapError(
            f"the model in {folder} is quantised already ({str(method)[:40]}): give the one with float weights that it "
            "was made from"
        )
    if fields.get("transformers_weights"):
        raise SaapError(f"{folder}/config.json names a weights file of its own (transformers_weights): remove that")
    for name, value in _all_fields(fields):
        # transformers would download and run a kernel repository of that name
        if name.endswith("_implementation") and "/" in str(value):
            raise SaapError(f"{folder}/config.json asks for code from elsewhere ({name} {value}): remove that")
        if name in ("num_hidden_layers", "n_layer") and isinstance(value, int) and value > MOST_BLOCKS:
            raise SaapError(f"{folder}/config.json asks for {value} layers, more than any model has ({MOST_BLOCKS})")
    return fields


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: model.safetensors, else those its index names. Other files are passed over.

    Raises SaapError when there are none or an index points elsewhere.
    """
    if (folder / "adapter_config.json").exists():
        raise SaapError(f"{folder} holds an adapter: merge it into its model and save that")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    named = _named_in(index) if index.exists() else []
    if single.exists():  # transformers reads it, whatever an index beside it says
        return [_regular(single)]
    if not named:
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        raise SaapError(
            f"no model.safetensors in {folder}, nor an index of its parts{f' (only {others})' if others else ''}: "
            "save the model with save_pretrained (pickles are not read)"
        )
    return named


def _named_in(index: Path) -> list[Path]:
    _regular(index)
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SaapError(f"cannot read {index}: {first_line(error)}") from error
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise SaapError(f"{index} names {name!r}: only safetensors files beside it are read")
        if not (index.parent / name).exists():
            raise SaapError(f"{index} names {name}, which is missing")
    return [_regular(index.parent / name) for name in sorted(named)]


def _regular(file: Path) -> Path:
    """The file itself. Raises SaapError when reading it could wait for ever (a pipe) or never end (a device)."""
    if not file.is_file():
        raise SaapError(f"{file} is no regular file")
    return file


def own_head(folder: Path) -> bool:
    """Whether the weights hold an lm_head that differs from the embeddings; a model with tied ones would ignore it.

    False also when the folder has no weights that can be read; `check_sizes` then says what is wrong.
    """
    try:
        places = {name: file for file in weight_files(folder) for name in tensor_shapes([file])}
    except SaapError:
        return False
    inner = next((name for name in places if name.endswith(EMBEDDINGS)), None)
    if inner is None or "lm_head.weight" not in places:
        return False
    with (
        safe_open(places["lm_head.weight"], framework="pt") as first,
        safe_open(places[inner], framework="pt") as second,
    ):
        head, embeddings = first.get_slice("lm_head.weight"), second.get_slice(inner)
        if head.get_shape() != embeddings.get_shape():
            return True
        rows = range(0, head.get_shape()[0], 4096)
        return any(not torch.equal(head[i : i + 4096].float(), embeddings[i : i + 4096].float()) for i in rows)


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """name → shape of every tensor, from the headers alone. Raises SaapError for a damaged file or a foreign dtype."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    about = stored.get_slice(name)
                    kind = about.get_dtype()
                    if kind not in (("U8",) if name.endswith(".codes") else FLOATS):
                        raise SaapError(f"{file}: {name} has dtype {kind}; floats are read, and U8 for int4 codes")
                    shapes[name] = tuple(about.get_shape())
        except (SafetensorError, OSError) as error:
            raise SaapError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error
    return shapes


def check_sizes(config: Any, folder: Path) -> Any:
    """Raises SaapError when config.json describes more numbers than the files hold: before memory is taken for them.

    Returns the model it describes, empty (on the meta device).
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    shapes = tensor_shapes(weight_files(folder))
    held = sum(prod(shape) for shape in shapes.values())
    layers = config.num_hidden_layers
    if layers > len(shapes):
        raise SaapError(
            f"the {len(shapes)} tensors in {folder} do not fit its config.json: it asks for {layers} layers"
        )
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
            model.tie_weights()
    except Exception as error:  # any error while building comes from what the file says
        raise SaapError(f"{folder}/config.json describes no model: {first_line(error)}") from error
    described = sum(p.numel() for p in model.parameters())  # tied ones once
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    described += sum(t.numel() for name, t in model.state_dict().items() if name not in everything)
    if described > held:
        raise SaapError(
            f"the tensors in {folder} do not fit its config.json: it describes {described:,} numbers, they are {held:,}"
        )
    _check_names(model, shapes, folder)
    return model


def _check_names(model: Any, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raises SaapError for tensors that are missing, of another shape, or that the model has no place for.

    Files of a Baichuan, and those whose names mostly differ from the model's (another prefix), are left to `load`.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = _fused(shapes, wanted)
    split_on_loading = any(name.endswith("W_pack.weight") for name in shapes)
    if split_on_loading or len(wanted.keys() & shapes.keys()) < len(wanted) / 2:
        return
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    wrong = {
        "missing": sorted(wanted.keys() - shapes.keys() - tied),
        "mismatched": [
            f"{name} {list(shapes[name])} for {list(shape)}"
            for name, shape in sorted(wanted.items())
            if shapes.get(name, shape) != shape
        ],
        # checkpoints of the first Llama carry the rotary frequencies, which are computed
        "unexpected": sorted(n for n in shapes.keys() - wanted.keys() if not n.endswith("rotary_emb.inv_freq")),
    }
    wrong = {what: names for what, names in wrong.items() if names}
    if wrong:
        raise SaapError(f"the tensors in {folder} do not fit its config.json: {wrong}"[:400])


# how files name what transformers fuses on loading: an expert's matrices one by one, as Qwen3-MoE's and Mixtral's do
_EXPERTS = (
    (re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight$"), ".experts.gate_up_proj"),
    (re.compile(r"\.experts\.\d+\.(down_proj|w2)\.weight$"), ".experts.down_proj"),
)


def _fused(shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes by the names of the model's tensors; of experts that are not all there, their count of numbers."""
    found: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        moved = name.replace(".block_sparse_moe.", ".mlp.")
        fused = next((pattern.sub(target, moved) for pattern, target in _EXPERTS if pattern.search(moved)), None)
        if fused is None:
            found[moved] = shape
        else:
            counts[fused] = counts.get(fused, 0) + prod(shape)
    whole = {name: wanted[name] for name, count in counts.items() if prod(wanted.get(name, (0,))) == count}
    return found | {name: (count,) for name, count in counts.items()} | whole


def _all_fields(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        yield name, value
        if isinstance(value, dict):
            yield from _all_fields(value)
