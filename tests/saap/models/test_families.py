"""Every family the same way: small random models of transformers' own classes, against slices, autograd and masks."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from saap import (
    GroupwiseLinear,
    SaapError,
    discover,
    load,
    mask,
    prune,
    quantize,
    save,
    score,
    select,
    size_of,
    to_groupwise,
)
from saap import weight_norms as norms_of
from saap.models.modeling_baichuan import SaapBaichuanConfig, SaapBaichuanForCausalLM

IDS = torch.randint(3, 512, (3, 13), generator=torch.Generator().manual_seed(2))
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
LAYERS = 4
SMALL = {"vocab_size": 512, "hidden_size": 64, "initializer_range": 0.1, "eos_token_id": 2}
GATED = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
GATED |= {"max_position_embeddings": 256}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}

LLAMA_LIKE = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "mistral": (MistralForCausalLM, MistralConfig, GATED | {"sliding_window": None}),
    "mistral, sliding window, one KV head": (
        MistralForCausalLM,
        MistralConfig,
        GATED | {"sliding_window": 5, "num_key_value_heads": 1},
    ),
    "mistral, wide heads": (MistralForCausalLM, MistralConfig, GATED | {"head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GATED | {"tie_word_embeddings": True}),
    "qwen2, layer types": (Qwen2ForCausalLM, Qwen2Config, GATED | WINDOW),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GATED | {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3, layer types, biases": (
        Qwen3ForCausalLM,
        Qwen3Config,
        GATED | WINDOW | {"head_dim": 16, "attention_bias": True},
    ),
}
GEMMA = GATED | {"head_dim": 24, "hidden_activation": "gelu_pytorch_tanh"}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
NOT_ALL = {"layer_types": LAYER_TYPES, "sliding_window": 5}
OTHERS = {
    "gemma": (GemmaForCausalLM, GemmaConfig, GEMMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA | NOT_ALL | {"final_logit_softcapping": 3.0}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA | NOT_ALL),
    "gemma3, one KV head, capped": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GEMMA | NOT_ALL | {"num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, GATED | {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 2}),
    "smollm3, window": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        GATED | NOT_ALL | {"use_sliding_window": True, "pad_token_id": 2, "no_rope_layers": [0, 1, 1, 0]},
    ),
    "ministral3": (Ministral3ForCausalLM, Ministral3Config, GATED | {"head_dim": 24, "sliding_window": 5}),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        GATED
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, GATED | {"pad_token_id": 2}),
    "phi3, partial rope, one KV head": (
        Phi3ForCausalLM,
        Phi3Config,
        GATED | {"pad_token_id": 2, "partial_rotary_factor": 0.5, "num_key_value_heads": 1},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, GATED | {"head_dim": 16, "pad_token_id": 2}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, GATED | {"pad_token_id": 2}),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config, GATED | NOT_ALL | {"pad_token_id": 2}),
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        GATED
        | {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "pad_token_id": 2},
    ),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, GATED | NOT_ALL | {"logit_scale": 0.5, "pad_token_id": 2}),
}
BY_QUERY = {
    "llama, by query heads": (LlamaForCausalLM, LlamaConfig, GATED | {"num_attention_heads": 8, "heads": "query"}),
    "phi3, by query heads": (
        Phi3ForCausalLM,
        Phi3Config,
        GATED | {"num_attention_heads": 8, "heads": "query", "pad_token_id": 2},
    ),
    "olmo2, by query heads": (
        Olmo2ForCausalLM,
        Olmo2Config,
        GATED | {"num_attention_heads": 8, "heads": "query", "pad_token_id": 2},
    ),
}
LLAMA_LIKE |= OTHERS | BY_QUERY
BLOOM = {
    "bloom": (BloomForCausalLM, BloomConfig, {"n_layer": LAYERS, "n_head": 4}),
    "bloom, 12 heads, residual after the norm": (
        BloomForCausalLM,
        BloomConfig,
        {"n_layer": LAYERS, "n_head": 12, "hidden_size": 48, "apply_residual_connection_post_layernorm": True},
    ),
}
TWELVE = {"num_attention_heads": 12, "num_key_value_heads": 12, "hidden_size": 48}
BAICHUAN = {"baichuan-13b, 12 heads": (SaapBaichuanForCausalLM, SaapBaichuanConfig, GATED | TWELVE)}
CASES = LLAMA_LIKE | BLOOM | BAICHUAN
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMAS = {
    "llama, no shared KV heads, biases": (LlamaForCausalLM, LlamaConfig, GATED | BIASES | {"num_key_value_heads": 4}),
    "llama, one KV head, tied": (
        LlamaForCausalLM,
        LlamaConfig,
        GATED | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


def build(case):
    model_class, config_class, fields = (CASES | LLAMAS)[case]
    torch.manual_seed(0)
    model = model_class(config_class(**(SMALL | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(params=CASES | LLAMAS)
def model(request):
    return build(request.param)


@pytest.fixture(params=LLAMA_LIKE)
def llama_like(request):
    return build(request.param)


def layers(model):
    return model.transformer.h if "bloom" in model.config.model_type else model.model.layers


def coupled(model, layer):
    """kind → one list per unit of (linear, axis, slice): written down from the papers' and transformers' layouts."""
    if "bloom" in model.config.model_type:
        a, m = layer.self_attention, layer.mlp
        d = model.config.hidden_size // model.config.n_head
        fused = [slice(3 * d * h, 3 * d * (h + 1)) for h in range(a.dense.in_features // d)]
        columns = [slice(d * h, d * (h + 1)) for h in range(len(fused))]
        channels = [slice(j, j + 1) for j in range(m.dense_h_to_4h.out_features)]
        return {
            "attention": [[(a.query_key_value, 0, f), (a.dense, 1, c)] for f, c in zip(fused, columns, strict=True)],
            "mlp": [[(m.dense_h_to_4h, 0, j), (m.dense_4h_to_h, 1, j)] for j in channels],
        }
    if hasattr(layer, "block_type"):  # a hybrid: attention of either kind is left whole
        m = layer.mlp
        rows = [slice(j, j + 1) for j in range(m.down_proj.in_features)]
        return {"mlp": [[(m.gate_proj, 0, j), (m.up_proj, 0, j), (m.down_proj, 1, j)] for j in rows]}
    a, m = layer.self_attn, layer.mlp
    d = a.head_dim
    n_rep, queries = a.num_key_value_groups, a.o_proj.in_features // d
    fused = hasattr(a, "qkv_proj")
    q, k, v = [a.qkv_proj] * 3 if fused else (a.q_proj, a.k_proj, a.v_proj)
    k_from, v_from = (queries * d, (queries + queries // n_rep) * d) if fused else (0, 0)
    alone = getattr(model.config, "heads", "kv") == "query" or (
        model.config.model_type[:5] != "saap_" and queries == n_rep
    )
    attention = []
    if alone:  # k and v stay
        units = [slice(h * d, (h + 1) * d) for h in range(queries)]
        attention = [[(q, 0, unit), (a.o_proj, 1, unit)] for unit in units]
    else:
        for h in range(queries // n_rep):
            query = slice(h * n_rep * d, (h + 1) * n_rep * d)
            key, value = (slice(start + h * d, start + (h + 1) * d) for start in (k_from, v_from))
            attention.append([(q, 0, query), (k, 0, key), (v, 0, value), (a.o_proj, 1, query)])
    width = m.down_proj.in_features
    gate, up, up_from = (
        (m.gate_up_proj, m.gate_up_proj, width) if hasattr(m, "gate_up_proj") else (m.gate_proj, m.up_proj, 0)
    )
    mlp = [
        [(gate, 0, slice(j, j + 1)), (up, 0, slice(up_from + j, up_from + j + 1)), (m.down_proj, 1, slice(j, j + 1))]
        for j in range(width)
    ]
    return {"attention": attention, "mlp": mlp}


def each_group(model):
    for layer, module in enumerate(layers(model)):
        for kind, units in coupled(model, module).items():
            for unit, parts in enumerate(units):
                yield layer, kind, unit, parts


def take(tensor, axis, piece):
    return tensor[piece] if axis == 0 else tensor[:, piece]


def random_keep(model, seed=0):
    """A different number of kept units, ≥ 1, in every layer and kind; some lower units go while higher ones stay."""
    rng = np.random.default_rng(seed)
    groups = discover(model)
    keep = np.zeros(len(groups), bool)
    for layer, kind, index in groups.structures():
        stretches = index.reshape(groups.stretches(layer, kind), -1)
        count = rng.integers(1, stretches.shape[1] + 1)
        for own in stretches:
            keep[rng.permutation(own)[:count]] = True
    return keep


def over_some(forward, norm, gone):
    """An RMS norm of the places that are not gone, written down from its definition."""
    here = torch.ones(len(norm.weight))
    for piece in gone:
        here[piece] = 0
    return lambda x: (
        norm.weight
        * x
        * here
        * ((x * here).square().sum(-1, keepdim=True) / here.sum() + norm.variance_epsilon).rsqrt()
    )


@torch.no_grad()
def silenced(model, keep):
    """The dense model, the output columns of its removed groups zeroed.

    OLMo's norms of q and k run over all heads: they are given the heads that stay, and zeros in the places of others.
    """
    model = copy.deepcopy(model)
    gone = {}
    for (*_, parts), kept in zip(list(each_group(model)), keep, strict=True):
        for linear, _, piece in [] if kept else parts:
            gone.setdefault(id(linear), []).append(piece)
    for layer in layers(model) if "olmo" in model.config.model_type else []:
        for norm, linear in (
            (layer.self_attn.q_norm, layer.self_attn.q_proj),
            (layer.self_attn.k_norm, layer.self_attn.k_proj),
        ):
            norm.forward = over_some(norm.forward, norm, gone.get(id(linear), []))
    for (_, _, _, parts), kept in zip(list(each_group(model)), keep, strict=True):
        for linear, axis, piece in parts:
            if axis == 1 and not kept:
                linear.weight[:, piece] = 0
    return model


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def assert_same_bits(again, model):
    """Also of what computes: a loaded file leaves tensors at odd addresses, where matrix products round differently."""
    again = copy.deepcopy(again)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    for parameter in again.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(again), logits(model))


def test_groups_and_their_sizes_are_the_slices_that_go_together(model):
    expected = []
    for layer, kind, unit, parts in each_group(model):
        size = sum(take(linear.weight, axis, piece).numel() for linear, axis, piece in parts)
        size += sum(linear.bias[p].numel() for linear, axis, p in parts if axis == 0 and linear.bias is not None)
        if kind == "attention" and "olmo" in model.config.model_type:  # its norms of q and k run over all heads
            size += sum(take(m.weight, axis, p).shape[0] for m, axis, p in parts[:2] if axis == 0)
        expected.append((layer, kind, unit, size))
    groups = discover(model)
    found = zip(groups.layer, groups.kind, groups.unit, groups.parameters, strict=True)
    assert [(int(a), str(b), int(c), int(d)) for a, b, c, d in found] == expected


def test_weight_norms_are_the_sums_of_squares_of_each_group(model):
    expected = [
        sum(take(linear.weight, axis, piece).double().square().sum().item() for linear, axis, piece in parts)
        for *_, parts in each_group(model)
    ]
    assert norms_of(model).dtype == np.float64
    np.testing.assert_allclose(norms_of(model), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", ["dense", "pruned"])
def test_scores_equal_plain_autograd_at_batch_1(model, shape):
    if shape == "pruned":
        model = prune(model, random_keep(model))
    exact = copy.deepcopy(model).double()
    vectors, elements = [], []
    for ids in IDS[:, None]:
        exact.zero_grad()
        exact(ids, labels=ids).loss.backward()
        vector, element = [], []
        for *_, parts in each_group(exact):
            coarse = fine = 0.0
            for linear, axis, piece in parts:
                s = take(linear.weight * linear.weight.grad, axis, piece).detach()
                coarse += s.sum(1 - axis).abs().sum().item()
                fine += (s - 0.5 * s.square()).abs().sum().item()
            vector.append(coarse)
            element.append(fine)
        vectors.append(vector)
        elements.append(element)
    plain_vector, plain_element = np.array(vectors), np.array(elements)
    for batch_size in (1, 2):
        vector, element = score(model, IDS, batch_size=batch_size)
        np.testing.assert_allclose(element, plain_element, rtol=1e-4)
        # where the vector score's |Σ s| cancels, float32 leaves some of the Σ |s| it cancelled from
        assert (np.abs(vector - plain_vector) <= 1e-4 * plain_vector + 1e-5 * plain_element).all()


@pytest.mark.parametrize(
    ("case", "seed"), [(case, seed) for case in CASES | LLAMAS for seed in range(1 if case in OTHERS else 3)]
)
def test_pruned_logits_equal_those_of_the_masked_dense_model(case, seed):
    model = build(case)
    keep = random_keep(model, seed)
    oracle = logits(silenced(model, keep))
    small = prune(model, keep)
    torch.testing.assert_close(logits(small), oracle, rtol=1e-5, atol=1e-5)
    if "olmo" in model.config.model_type:  # whose weights make up for the count of heads
        torch.testing.assert_close(logits(mask(model, keep)), oracle, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(mask(model, keep)), oracle)
    assert (oracle - logits(model)).abs().max() > 0.01
    removed = discover(model).parameters[~keep].sum()
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - removed
    assert discover(small).parameters.sum() == discover(model).parameters[keep].sum()


def test_a_plan_of_select_can_be_applied(model):
    groups = discover(model)
    keep = select(np.random.default_rng(0).random(len(groups)), groups, 0.3, protect=(0,), align=8)
    torch.testing.assert_close(logits(prune(model, keep)), logits(silenced(model, keep)), rtol=1e-5, atol=1e-5)


def test_pruning_twice_equals_pruning_once(model):
    first = random_keep(model, 1)
    once = prune(model, first)
    second = random_keep(once, 2)
    both = first.copy()
    both[first] = second
    twice, direct = prune(once, second), prune(model, both)
    assert_same_bits(twice, direct)
    assert twice.config.to_dict() == direct.config.to_dict()


@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained], ids=["saap", "transformers"])
def test_a_saved_pruned_model_loads_bit_for_bit_and_keeps_its_configuration(model, tmp_path, reader):
    small = prune(model, random_keep(model))
    save(small, tmp_path)
    again = reader(tmp_path)
    assert type(again) is type(small)
    assert_same_bits(again, small)
    for name in ("sliding_window", "layer_types", "rope_parameters", "tie_word_embeddings"):
        assert getattr(again.config, name, None) == getattr(model.config, name, None)


def test_generation_with_a_cache_equals_generation_without(model):
    small = prune(model, random_keep(model))
    cached = small.generate(IDS, use_cache=True, **GREEDY)
    assert torch.equal(cached, small.generate(IDS, use_cache=False, **GREEDY))
    ids = IDS
    for _ in range(12):
        scores = logits(small, ids)[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)


def test_the_attention_implementation_can_be_changed_after_loading(llama_like, tmp_path):
    small = prune(llama_like, random_keep(llama_like))
    save(small, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for implementation in ("eager", "sdpa") if again._supports_sdpa else ("eager",):
        again.set_attn_implementation(implementation)
        attention = [b.self_attn for b in layers(again) if hasattr(b, "self_attn")]
        assert {layer.config._attn_implementation for layer in attention} == {implementation}
        torch.testing.assert_close(logits(again), logits(small), rtol=1e-5, atol=1e-5)


def test_a_left_padded_batch_equals_its_rows_alone(model):
    small, pad = prune(model, random_keep(model)), 4
    ids, seen = IDS.clone(), torch.ones_like(IDS)
    ids[1, :pad], seen[1, :pad] = 2, 0
    together = logits(small, ids, attention_mask=seen)
    torch.testing.assert_close(together[:1], logits(small, ids[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:2, pad:], logits(small, ids[1:2, pad:]), rtol=1e-4, atol=1e-5)
    generated = small.generate(ids, attention_mask=seen, **GREEDY)
    assert torch.equal(generated, small.generate(ids, attention_mask=seen, use_cache=False, **GREEDY))
    assert torch.equal(generated[1:2, pad:], small.generate(ids[1:2, pad:], **GREEDY))


def expected_sizes(model):
    """Parameters, and the multiply-accumulates of one token over 100 positions."""
    macs = SMALL["vocab_size"] * model.config.hidden_size
    for layer in layers(model):
        macs += sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
    for _, kind, _, parts in each_group(model):
        if kind == "attention":
            macs += 2 * 100 * sum(take(m.weight, 1, piece).shape[1] for m, axis, piece in parts if axis == 1)
    return sum(p.numel() for p in model.parameters()), macs


def test_sizes_are_those_of_the_linear_layers_and_the_cache(model):
    for shape in (model, prune(model, random_keep(model))):
        assert (size_of(shape).parameters, size_of(shape).macs_per_token(100)) == expected_sizes(shape)


def test_an_int4_model_has_the_sizes_of_the_float_one(llama_like):
    small = prune(llama_like, random_keep(llama_like))
    size = size_of(to_groupwise(small, 32))
    assert (size.parameters, size.macs_per_token(100), size.dtype) == (*expected_sizes(small), "int4")


@pytest.mark.parametrize(
    ("case", "shape", "group_size"),
    [(case, "pruned", 32) for case in LLAMA_LIKE]
    + [(case, "dense", 32) for case in LLAMA_LIKE if case not in OTHERS]
    + [(case, "pruned", 20) for case in LLAMA_LIKE if case not in OTHERS],
)
def test_int4_models_compute_with_their_codes_and_load_bit_for_bit(case, shape, group_size, tmp_path):
    llama_like = build(case)
    model = llama_like if shape == "dense" else prune(llama_like, random_keep(llama_like))
    linears = sum(isinstance(m, nn.Linear) for layer in layers(model) for m in layer.modules())
    small = to_groupwise(model, group_size)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for linear in (m for layer in layers(oracle) for m in layer.modules() if isinstance(m, nn.Linear)):
            codes, scale, zero = quantize(linear.weight, group_size)
            group = torch.arange(codes.shape[1]) // group_size
            linear.weight.copy_(codes.float() * scale.float()[:, group] + zero.float()[:, group])
    torch.testing.assert_close(logits(small), logits(oracle), rtol=1e-5, atol=1e-5)
    assert not any(type(m) is nn.Linear for layer in layers(small) for m in layer.modules())
    save(small, tmp_path)
    for again in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert sum(isinstance(m, GroupwiseLinear) for m in again.modules()) == linears
        assert_same_bits(again, small)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(IDS, use_cache=True, **GREEDY), small.generate(IDS, use_cache=False, **GREEDY))


@pytest.fixture(params=BLOOM)
def bloom(request):
    return build(request.param)


@pytest.fixture(params=BLOOM | BAICHUAN)
def alibi(request):
    return build(request.param)


def test_alibi_heads_keep_the_number_that_gives_their_slope(alibi, tmp_path):
    groups, keep = discover(alibi), random_keep(alibi)
    keep[(groups.kind == "attention") & (groups.unit == 0)] = False  # so that all move to lower places
    keep[(groups.kind == "attention") & (groups.unit == 2)] = True
    once = prune(alibi, keep)
    second = random_keep(once, 1)
    save(prune(once, second), tmp_path)
    final = keep.copy()
    final[keep] = second
    again = load(tmp_path)
    for layer in range(LAYERS):
        mine = final & (groups.layer == layer) & (groups.kind == "attention")
        assert again.config.per_layer_config[layer].kept_heads == groups.unit[mine].tolist()
    assert again.config.num_attention_heads == alibi.config.num_attention_heads
    torch.testing.assert_close(logits(again), logits(silenced(alibi, final)), rtol=1e-5, atol=1e-5)
    moved = copy.deepcopy(again)
    for module in layers(moved):
        if alibi.config.model_type == "bloom":
            module.kept_heads = list(range(len(module.kept_heads)))
        else:
            module.self_attn.slopes = alibi.model.layers[0].self_attn.slopes[: len(module.self_attn.slopes)]
    assert (logits(moved) - logits(again)).abs().max() > 0.01


def test_a_family_without_an_int4_form_says_so(alibi):
    with pytest.raises(SaapError, match=f"'{alibi.config.model_type}'"):
        to_groupwise(alibi, 32)


def test_bloom_that_multiplies_past_its_linear_layers_is_refused(bloom):
    bloom.config.slow_but_exact, bloom.config.pretraining_tp = True, 4
    with pytest.raises(SaapError, match="slow_but_exact"):
        discover(bloom)


def publish_baichuan(model, folder, **fields):
    """The weights of a model as a Baichuan's checkpoint in two shards, with code that must not run."""
    state = model.state_dict()
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.self_attn"
        stacked = torch.cat([state.pop(f"{path}.{letter}_proj.weight") for letter in "qkv"])
        state[f"{path}.W_pack.weight"] = stacked
        if "max_position_embeddings" in fields:
            state[f"{path}.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(state)
    for number, shard in enumerate((names[::2], names[1::2])):
        save_file({name: state[name].contiguous() for name in shard}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number in (0, 1) for name in names[number::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    names = ("hidden_act", "rms_norm_eps", "num_hidden_layers", "num_attention_heads", "intermediate_size", *SMALL)
    fields |= {name: getattr(model.config, name) for name in names} | {"model_type": "baichuan"}
    fields["auto_map"] = {"AutoConfig": "code.BaichuanConfig", "AutoModelForCausalLM": "code.BaichuanForCausalLM"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")


@pytest.fixture
def baichuan(tmp_path):
    """(a Llama, the folder of its weights as a Baichuan-7B)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | GATED | {"num_key_value_heads": 4}))).eval()
    publish_baichuan(model, tmp_path, architectures=["BaiChuanForCausalLM"], max_position_embeddings=256)
    return model, tmp_path


def test_baichuan_7b_is_read_as_the_llama_it_is_and_pruned_as_one(baichuan):
    model, folder = baichuan
    again = load(folder)
    assert type(again) is LlamaForCausalLM
    assert_same_bits(again, model)
    x = torch.randn(5, 64)
    stacked = load_file(folder / "model-0.safetensors") | load_file(folder / "model-1.safetensors")
    query, key, value = (x @ stacked["model.layers.2.self_attn.W_pack.weight"].T).unflatten(-1, (3, 64)).unbind(-2)
    attention = again.model.layers[2].self_attn
    for projection, expected in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
        torch.testing.assert_close(projection(x), expected)
    keep = random_keep(again)
    save(prune(again, keep), folder / "small")
    torch.testing.assert_close(logits(load(folder / "small")), logits(silenced(model, keep)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_position_embeddings": None}, "config.json"),
        ({"vocab_size": 125696}, "Baichuan 2"),
        ({"intermediate_size": 97}, "do not fit"),
        ({"rms_norm_eps": None}, "config.json"),
    ],
)
def test_baichuans_that_are_no_llamas_or_do_not_fit_are_refused(baichuan, change, reason):
    _, folder = baichuan
    fields = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(SaapError, match=reason):
        load(folder)


def published_slopes(n):
    """ALiBi's own recipe: a geometric sequence for powers of two, else that of the next lower, filled up from 2n."""
    if n & (n - 1) == 0:
        first = 2 ** (-(2 ** -(n.bit_length() - 1 - 3)))
        return [first ** (i + 1) for i in range(n)]
    lower = 1 << (n.bit_length() - 1)
    return published_slopes(lower) + published_slopes(2 * lower)[0::2][: n - lower]


@pytest.mark.parametrize("heads", [4, 12, 40])
def test_baichuan_13b_in_its_published_layout_computes_attention_as_published(tmp_path, heads):
    torch.manual_seed(1)
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 4 * heads}
    made = SaapBaichuanForCausalLM(SaapBaichuanConfig(**(SMALL | GATED | shape)))
    publish_baichuan(made, tmp_path, architectures=["BaichuanForCausalLM"], model_max_length=256)
    model = load(tmp_path)
    assert_same_bits(model, made)
    packed = load_file(tmp_path / "model-0.safetensors") | load_file(tmp_path / "model-1.safetensors")
    x, found = torch.randn(2, 9, 4 * heads), []
    attention = model.model.layers[2].self_attn
    attention.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    attention.register_forward_pre_hook(lambda module, args, kw: (args, kw | {"hidden_states": x}), with_kwargs=True)
    with torch.no_grad():
        model(IDS[:2, :9])
    q, k, v = (x @ packed["model.layers.2.self_attn.W_pack.weight"].T).unflatten(-1, (3, heads, 4)).unbind(-3)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores += torch.tensor(published_slopes(heads))[:, None, None] * torch.arange(9)
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    expected = (
        torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ packed["model.layers.2.self_attn.o_proj.weight"].T
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_baichuan_13b_refuses_attention_that_would_lose_its_positions(tmp_path):
    model = build("baichuan-13b, 12 heads")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        model.set_attn_implementation("sdpa")
