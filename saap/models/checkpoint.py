"""Models on disk: safetensors and config.json, uneven and int4 ones included."""

import copy
import logging
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from saap.errors import SaapError, damaged_weight, first_line
from saap.models.convert_baichuan import split_config, split_state
from saap.models.families import family_of
from saap.models.offload import device_map
from saap.models.validation import check_sizes, own_head, read_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Write model (and tokenizer) as safetensors and JSON; loading them again gives the same bits.

    An uneven model brings its modelling file with it, named in config.json's auto_map: without this package
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it.
    """
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
    for file in folder.glob("model*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors lets the owner alone read them
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu", offload: bool = False) -> nn.Module:
    """The model in a local folder, in eval mode. dtype is one of `DTYPES`; int4 codes and scales stay as they are.

    offload leaves the weights of the layers in their files, from where accelerate fetches them to the device when a
    layer runs: for `discover`, `score` and `weight_norms` of a model larger than the device.

    Raises SaapError for a missing folder, a damaged or truncated file, tensors that do not fit config.json, or a
    family we cannot prune. Never runs code from the folder, never unpickles, never looks outside it; takes no memory
    before config.json and the files' headers agree. A Baichuan's W_pack is split (`saap.models.convert_baichuan`).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    folder = Path(folder)
    config = load_config(folder)
    if dtype not in DTYPES:
        raise SaapError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}")
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise SaapError(f"models run on 'cpu' or 'cuda', not on '{device}'")
    check_sizes(config, folder)
    converted = _baichuan(read_fields(folder))
    if offload and converted:
        raise SaapError(f"{folder} is converted on loading and cannot stay on disk: load it whole and save it once")
    try:
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "local_files_only": True, "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # they are refused below, by name
        if offload:
            options["device_map"] = device_map(config, device)
        if converted:
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded: Any = model_class.from_pretrained(None, config=config, state_dict=split_state(folder), **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, config=config, use_safetensors=True, trust_remote_code=False, **options
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError) as error:
        raise SaapError(f"cannot load the model in {folder}: {first_line(error)}") from error
    model, info = loaded
    # checkpoints of the first Llama carry the rotary frequencies, which are computed
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    mismatched = [f"{name} {list(held)} for {list(wanted)}" for name, held, wanted in info["mismatched_keys"]]
    wrong = {"missing": info["missing_keys"], "mismatched": mismatched, "unexpected": unexpected}
    wrong = {what: sorted(map(str, names)) for what, names in wrong.items() if names}
    if wrong:
        raise SaapError(f"the tensors in {folder} do not fit its config.json: {wrong}"[:400])
    return (model if offload else model.to(device)).eval()


def check_finite(model: nn.Module, folder: str | Path) -> None:
    """Raises SaapError if a weight of the model loaded from `folder` is not finite (`damaged_weight`)."""
    if (damaged := damaged_weight(model)) is not None:
        name, weight = damaged
        narrow = ", or too large for float16 (model.dtype)" if weight.dtype == torch.float16 else ""
        raise SaapError(f"{name} of the model in {folder} is not finite: the model itself is damaged{narrow}")


def load_config(folder: str | Path) -> Any:
    """The transformers config of a local folder, as the model is loaded by it.

    Two fields may differ from the file, each with a warning: `tie_word_embeddings` is False where the weights hold an
    output head of their own, and an attention that is neither eager nor sdpa gives way to sdpa, as our masks need it.
    Raises SaapError if there is none, it cannot be read, or is of a family we do not know.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise SaapError(f"no model in {folder}: there is no config.json")
    fields = read_fields(folder)
    try:
        if _baichuan(fields):
            config = split_config(fields)
        else:
            family_of(SimpleNamespace(model_type=str(fields.get("model_type"))))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except SaapError:
        raise
    except Exception as error:  # transformers raises errors of many kinds here, all caused by the file
        raise SaapError(f"cannot read {folder}/config.json: {first_line(error)}") from error
    if config.tie_word_embeddings and own_head(folder):
        config.tie_word_embeddings = False
        _warn(f"{folder}/config.json says tie_word_embeddings, but the weights hold another lm_head: that one is used")
    if config._attn_implementation not in (None, "eager", "sdpa"):
        _warn(f"{folder}/config.json asks for {config._attn_implementation}: computed with sdpa instead")
        config._attn_implementation = None
    return config


@lru_cache
def _warn(line: str) -> None:
    """Log a line once, however often the model is loaded."""
    logging.getLogger("saap").warning(line)


def complete(small: Any, model: Any) -> Any:
    """Give `small`, made on the meta device and its state loaded, what no state dict holds: copies from `model`."""
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if small.get_buffer(name).is_meta:  # rotary frequencies
            small.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _baichuan(fields: dict[str, Any]) -> bool:
    """Whether config.json is that of a Baichuan, which transformers would read only with the folder's own code."""
    return fields.get("model_type") == "baichuan"
