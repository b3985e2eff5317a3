"""What vLLM's own config code reads of our checkpoints, layer by layer; no model of vLLM's is made.

    pip download --no-deps vllm==0.33.0 -d vllm && unzip -q vllm/vllm-*.whl -d vllm
    pip install --no-deps --target vllm cbor2 pyzmq openai-harmony openai
    python benchmarks/vllm_config.py vllm FOLDER ...

Prints a line a checkpoint and, last, one JSON object. Ends with 1 when vLLM reads other heads than there are.
"""

import json
import sys
from pathlib import Path

import saap  # registers our config types


def read(folder: str) -> tuple[list[list[int]], list[list[int]]]:
    """Query heads, KV heads and head size of each layer: as vLLM reads them, and as the weights have them."""
    import vllm.config  # noqa: F401  # before the next: they import each other
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = get_config(folder, trust_remote_code=False)
    found = ModelArchConfigConvertorBase(config, config.get_text_config()).convert()
    theirs, ours = [], []
    for number, layer in enumerate(saap.load(folder).base_model.layers):
        own, attention = found[number], layer.self_attn
        theirs.append([own.total_num_attention_heads, own.total_num_kv_heads, own.head_size])
        queries = attention.q_proj.out_features // attention.head_dim
        ours.append([queries, attention.k_proj.out_features // attention.head_dim, attention.head_dim])
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
