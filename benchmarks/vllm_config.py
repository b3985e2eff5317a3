"""What vLLM's own config code reads of our checkpoints, layer by layer; no model of vLLM's is made.

    pip download --no-deps vllm==0.33.0 -d vllm && unzip -q vllm/vllm-*.whl -d vllm
    pip install --no-deps --target vllm cbor2 pyzmq openai-harmony openai
    python benchmarks/vllm_config.py vllm FOLDER ...

Prints a line a checkpoint and, last, one JSON object. Ends with 1 when vLLM reads other heads than there are, as it
does of a pruned BLOOM or Baichuan.
"""

import json
import sys
from pathlib import Path
from typing import Any

import saap  # registers our config types
from saap.models.families import family_of


def heads(layer: Any) -> list[int] | None:
    """Query heads, KV heads and head size as the weights have them; None for linear attention, which is left whole."""
    attention = getattr(layer, "self_attn", None) or getattr(layer, "self_attention", None)
    if attention is None:
        return None
    size = attention.head_dim
    if hasattr(attention, "query_key_value"):  # BLOOM
        return [attention.dense.in_features // size, attention.query_key_value.out_features // (3 * size), size]
    queries = attention.o_proj.in_features // size
    if hasattr(attention, "qkv_proj"):
        return [queries, (attention.qkv_proj.out_features // size - queries) // 2, size]
    return [queries, attention.k_proj.out_features // size, size]


def read(folder: str) -> tuple[list[list[int]], list[list[int]]]:
    """Query heads, KV heads and head size of each layer: as vLLM reads them, and as the weights have them."""
    import vllm.config  # noqa: F401  # before the next: they import each other
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = get_config(folder, trust_remote_code=False)
    found = ModelArchConfigConvertorBase(config, config.get_text_config()).convert()
    theirs, ours = [], []
    model = saap.load(folder)
    for number, layer in enumerate(family_of(model.config).layers(model)):
        if (there := heads(layer)) is not None:
            own = found[number]
            theirs.append([own.total_num_attention_heads, own.total_num_kv_heads, own.head_size])
            ours.append(there)
    return theirs, ours


def main() -> None:
    packages, *folders = sys.argv[1:]
    sys.path.append(packages)
    same = {}
    for folder in folders:
        theirs, ours = read(folder)
        same[Path(folder).name] = theirs == ours
        print(f"{folder}: {'as the weights are' if theirs == ours else f'{theirs} instead of {ours}'}")
    print(json.dumps({"same": same}))
    if not all(same.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
