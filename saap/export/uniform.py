"""One width for all layers: a stock config and class that transformers, vLLM and others load with nothing extra."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from saap.errors import SaapError
from saap.int4.quantize import dequantize
from saap.models.checkpoint import DTYPES, complete, load, load_config, save
from saap.models.families import Experts, family_of
from saap.models.tokenizer import load_tokenizer

STOCK = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "ministral3", "granite"),
    *("phi3", "glm4", "olmo2", "olmo3", "cohere2", "qwen3_5_text", "qwen3_moe", "mixtral", "gpt_oss"),
)
# config fields that a stock model does not use
OURS = (
    "model_type",
    "architectures",
    "per_layer_config",
    "transformers_version",
    "auto_map",
    "groupwise",
    "output_bias",
    "heads",
)
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _widths(config: Any) -> tuple[str, ...]:
    family = family_of(config)
    mixture = (family.layout.count, family.layout.width) if isinstance(family, Experts) else ()
    return tuple(dict.fromkeys((*WIDTHS, *mixture)))


def export_uniform(folder: str | Path, target: str | Path, *, round_to: int = 1) -> dict[str, Any]:
    """Write the checkpoint in `folder` as a stock one with equal layers; returns its class and widths.

    Narrower layers are filled up with zero heads and channels to the widest, which changes no output. A plan made with
    prune.search 'uniform' and nothing protected has equal layers: there nothing is filled.
    round_to: a tensor-parallel size. Query heads and MLP channels become multiples of it, KV heads multiples or
    divisors. int4 layers become floats, rounded to the checkpoint's dtype: stock classes have no place for our codes.
    Experts get zero channels too. Where layers keep different numbers of them, a layer gets experts that its router
    never picks, which takes a router with biases (gpt_oss); others are refused.

    Raises SaapError for a family, biases or numbers of experts that no stock class has.
    """
    if round_to < 1:
        raise SaapError(f"round_to must be at least 1, got {round_to}")
    stored = str(load_config(folder).dtype).removeprefix("torch.")
    model = dequantize(load(folder, dtype=stored if stored in DTYPES else "float32"))
    even = uniform(model, round_to)
    save(even, target, load_tokenizer(folder))
    return {"class": type(even).__name__, **{name: getattr(even.config, name) for name in _widths(even.config)}}


@torch.no_grad()
def uniform(model: Any, round_to: int = 1) -> Any:
    """A float model of a stock class with equal layers that computes what the given Llama-like one does."""
    state = model.state_dict()
    config = _stock_config(
        model.config, {name.split(".")[-2] for name in state if name.endswith("_proj.bias")}, round_to
    )
    dtype = model.get_input_embeddings().weight.dtype
    with torch.device("meta"):
        even = AutoModelForCausalLM.from_config(config)
    layers = list(model.config.per_layer_config)
    for name, place in even.state_dict().items():
        filled = torch.zeros(place.shape, dtype=dtype, device=model.device)
        if name in state:  # else a bias that the stock class has beside one of ours
            own = state[name]
            if own.shape == filled.shape or not name.startswith("model.layers."):
                filled.copy_(own)
            elif ".mlp.experts." in name or name.split(".")[-2] in ("gate", "router"):
                _fill_experts(filled, own, name)
            else:
                _, _, layer, *path, leaf = name.split(".")
                places = _places(layers[int(layer)], config)[path[-1]]
                if path[-1] in ("o_proj", "down_proj") and leaf == "weight":
                    filled[:, places] = own
                else:
                    filled[places] = own
                if path[-1] in ("q_norm", "k_norm"):  # its mean runs over the zeros too
                    filled *= (len(own) / len(filled)) ** 0.5
        state[name] = filled
    even.load_state_dict(state, assign=True)
    return complete(even, model)


def _fill_experts(filled: torch.Tensor, own: torch.Tensor, name: str) -> None:
    """Experts and their channels come first in the zeros, and a router's further experts get biases no token picks."""
    if name.endswith("router.bias"):
        filled.fill_(torch.finfo(filled.dtype).min / 2)
    if name.endswith("gate_up_proj") and own.shape[2] == filled.shape[2]:  # (experts, gate above up, hidden)
        filled, own = filled.unflatten(1, (2, -1)), own.unflatten(1, (2, -1))
    filled[tuple(slice(size) for size in own.shape)] = own


def _places(own: Any, even: Any) -> dict[str, torch.Tensor]:
    """Name of a matrix → the places of a layer's rows (of o_proj and down_proj: columns) in a larger one.

    Query heads stay under their KV head: (KV head, query head under it, place in the head). Fused matrices have the
    rows of theirs one after another. `even` has no fewer heads of either kind and channels than `own`.
    """
    size, repeat = even.head_dim, even.num_attention_heads // even.num_key_value_heads
    shared = torch.arange(own.num_key_value_heads)
    within = torch.arange(own.num_attention_heads // own.num_key_value_heads)
    rows = torch.arange(size)
    query = (((shared[:, None, None] * repeat + within[:, None]) * size) + rows).flatten()
    key = (shared[:, None] * size + rows).flatten()
    channels = torch.arange(own.intermediate_size)
    first, second = even.num_attention_heads * size, (even.num_attention_heads + even.num_key_value_heads) * size
    return {
        **dict.fromkeys(("q_proj", "o_proj", "q_norm"), query),
        **dict.fromkeys(("k_proj", "v_proj", "k_norm"), key),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), channels),
        "self_attn": query[::size] // size,  # its sinks, one a query head
        "qkv_proj": torch.cat([query, first + key, second + key]),
        "gate_up_proj": torch.cat([channels, even.intermediate_size + channels]),
    }


def _stock_config(old: Any, biased: set[str], round_to: int) -> Any:
    """The stock config for layers like the widest of `old`; `biased` names the layers that have a bias."""
    kind, layers = old.model_type.removeprefix("saap_"), list(old.per_layer_config)
    if kind not in STOCK:
        raise SaapError(f"{kind} has no stock form of other widths; uniform export knows {', '.join(STOCK)}")
    extra = biased - ({"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set())
    if extra and kind in ("mistral", "qwen2") and not getattr(old, "sliding_window", None):
        kind = "llama"  # the same model, in a class that knows all biases
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    possible = extra if kind == "llama" else attention if hasattr(old, "attention_bias") else set()
    if kind == "glm4":
        possible = attention - {"o_proj"}
    if hasattr(old, "mlp_bias"):
        possible = possible | {"gate_proj", "up_proj", "down_proj"}
    if extra - possible:
        raise SaapError(f"a stock {kind} has no bias on {', '.join(sorted(extra - possible))}")
    # these stock configs want heads that divide the hidden size
    divides = kind in ("gemma2", "gemma3_text") or (kind == "llama" and bool(extra))
    shared, repeat = _heads(old, round_to, divides)
    if kind == "llama" and old.hidden_size % (shared * repeat):
        kind = "mistral"  # without biases and window it is the same model, and its config takes any number of heads
    fields = {name: value for name, value in old.to_dict().items() if name not in OURS}
    fields |= {
        "head_dim": getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads,
        "num_attention_heads": shared * repeat,
        "num_key_value_heads": shared,
        "intermediate_size": -(-max(own.intermediate_size for own in layers) // round_to) * round_to,
    }
    fields |= _mixture_fields(old, layers, round_to)
    if kind == "mistral":
        fields["sliding_window"] = getattr(old, "sliding_window", None)
    if kind == "llama" or hasattr(old, "attention_bias"):
        fields["attention_bias"] = bool(biased & attention)
    if kind == "llama" or hasattr(old, "mlp_bias"):
        fields["mlp_bias"] = bool(biased & {"gate_proj", "up_proj", "down_proj"})
    return CONFIG_MAPPING[kind](**fields)


def _mixture_fields(old: Any, layers: list[Any], round_to: int) -> dict[str, int]:
    """The config fields of experts, wide enough for those of all layers that have some."""
    family = family_of(old)
    if not isinstance(family, Experts):
        return {}
    count, width = family.layout.count, family.layout.width
    mixed = [own for number, own in enumerate(layers) if family.has_experts(own, number)]
    counts = {getattr(own, count) for own in mixed}
    if len(counts) > 1 and family.layout.stacked:
        raise SaapError(
            f"layers keep {min(counts)} to {max(counts)} experts, and the router of a {family.model_types[0]} has no "
            "biases that would keep tokens from experts that are filled up: prune with prune.search = 'uniform' and "
            "prune.protect = []"
        )
    step = math.lcm(round_to, 8)  # torch's grouped product takes rows of whole 16 bytes only
    count = old.attribute_map.get(count, count)  # a Qwen3-MoE's config stores num_experts under another name
    return {count: max(counts), width: -(-max(getattr(own, width) for own in mixed) // step) * step}


def _heads(old: Any, round_to: int, divides: bool) -> tuple[int, int]:
    """(KV heads, query heads under each) of the smallest layer that has room for those of all."""
    layers, free = (
        list(old.per_layer_config),
        getattr(old, "heads", "kv") == "query",
    )  # else all have as many under each
    shared = max(own.num_key_value_heads for own in layers)
    repeat = max(own.num_attention_heads // own.num_key_value_heads for own in layers)
    more = old.hidden_size + round_to
    fitting = (
        (n * times, n, times)
        for n in range(shared, shared + (round_to if free else more))
        for times in range(repeat, repeat + (more if free else 1))
        if _fits(n, times, round_to) and not (divides and old.hidden_size % (n * times))
    )
    smallest = min(fitting, default=None)
    if smallest is None:
        raise SaapError(f"no number of heads above {shared * repeat} divides {old.hidden_size}, as a stock class wants")
    return smallest[1:]


def _fits(shared: int, repeat: int, round_to: int) -> bool:
    """Whether tensor parallelism over `round_to` devices can split (or repeat) the KV heads and split the queries."""
    return shared * repeat % round_to == 0 and (shared % round_to == 0 or round_to % shared == 0)
