"""One width for all blocks: a stock config and class that transformers, vLLM and others load with nothing extra."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from saap.errors import SaapError
from saap.int4.quantize import dequantize
from saap.models.checkpoint import DTYPES, complete, load, load_config, load_tokenizer, save

STOCK = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# config fields that say what a stock model has no use for
OURS = (
    "model_type",
    "architectures",
    "per_layer_config",
    "transformers_version",
    "auto_map",
    "groupwise",
    "output_bias",
)
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def export_uniform(folder: str | Path, target: str | Path, *, round_to: int = 1) -> dict[str, Any]:
    """Write the checkpoint in `folder` as a stock one with equal blocks; returns its class and widths.

    Narrower blocks are filled up with zero heads and channels to the widest, which changes no output. A plan made with
    prune.search 'uniform' and nothing protected has equal blocks: there nothing is filled.
    round_to: a tensor-parallel size. Query heads and MLP channels become multiples of it, KV heads multiples or
    divisors. int4 layers become floats of the same values: stock classes have no place for our codes.

    Raises SaapError for a family or biases that no stock class has.
    """
    if round_to < 1:
        raise SaapError(f"round_to must be at least 1, got {round_to}")
    stored = str(load_config(folder).dtype).removeprefix("torch.")
    model = dequantize(load(folder, dtype=stored if stored in DTYPES else "float32"))
    even = uniform(model, round_to)
    save(even, target, load_tokenizer(folder))
    return {"class": type(even).__name__, **{name: getattr(even.config, name) for name in WIDTHS}}


@torch.no_grad()
def uniform(model: Any, round_to: int = 1) -> Any:
    """A float model of a stock class, its blocks equal, that computes what the given Llama-like one does."""
    state = model.state_dict()
    config = _stock_config(
        model.config, {name.split(".")[-2] for name in state if name.endswith("_proj.bias")}, round_to
    )
    dtype = model.get_input_embeddings().weight.dtype
    with torch.device("meta"):
        even = AutoModelForCausalLM.from_config(config)
    for name, place in even.state_dict().items():
        filled = torch.zeros(place.shape, dtype=dtype, device=model.device)
        if name in state:  # else a bias that the stock class has beside one of ours
            filled[tuple(slice(size) for size in state[name].shape)] = state[name]
        state[name] = filled
    even.load_state_dict(state, assign=True)
    return complete(even, model)


def _stock_config(old: Any, biased: set[str], round_to: int) -> Any:
    """The stock config for blocks like the widest of `old`; `biased` names the layers that have a bias."""
    kind, blocks = old.model_type.removeprefix("saap_"), list(old.per_layer_config)
    if kind not in STOCK:
        raise SaapError(f"{kind} has no stock form of other widths; uniform export knows {', '.join(STOCK)}")
    repeat = blocks[0].num_attention_heads // blocks[0].num_key_value_heads
    if any(own.num_attention_heads != repeat * own.num_key_value_heads for own in blocks):
        raise SaapError("the blocks share KV heads among different numbers of query heads: no stock config says that")
    extra = biased - ({"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set())
    if extra and kind in ("mistral", "qwen2") and not getattr(old, "sliding_window", None):
        kind = "llama"  # the same model, and its class knows all biases
    possible = {"q_proj", "k_proj", "v_proj", "o_proj"} if kind == "qwen3" else set() if kind != "llama" else extra
    if extra - possible:
        raise SaapError(f"a stock {kind} has no bias on {', '.join(sorted(extra - possible))}")
    divides = kind == "llama" and bool(extra)  # of a Llama's config the heads must divide the hidden size
    heads = range(max(own.num_key_value_heads for own in blocks), old.hidden_size + round_to)
    shared = next(
        (n for n in heads if _fits(n, repeat, round_to) and not (divides and old.hidden_size % (n * repeat))), 0
    )
    if not shared:
        raise SaapError(f"no number of heads above {heads[0]} divides {old.hidden_size} as the stock Llama wants")
    if kind == "llama" and old.hidden_size % (shared * repeat):
        kind = "mistral"  # without biases and window the same model, and its config takes any number of heads
    fields = {name: value for name, value in old.to_dict().items() if name not in OURS}
    fields |= {
        "head_dim": getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads,
        "num_attention_heads": shared * repeat,
        "num_key_value_heads": shared,
        "intermediate_size": -(-max(own.intermediate_size for own in blocks) // round_to) * round_to,
    }
    if kind == "mistral":
        fields["sliding_window"] = getattr(old, "sliding_window", None)
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = bool(biased & {"q_proj", "k_proj", "v_proj", "o_proj"})
    if kind == "llama":
        fields["mlp_bias"] = bool(biased & {"gate_proj", "up_proj", "down_proj"})
    return STOCK[kind](**fields)


def _fits(shared: int, repeat: int, round_to: int) -> bool:
    """Whether tensor parallelism over `round_to` devices can split (or repeat) the KV heads and split the queries."""
    return shared * repeat % round_to == 0 and (shared % round_to == 0 or round_to % shared == 0)
