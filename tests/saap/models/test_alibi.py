"""BLOOM and Baichuan: heads with the slopes of ALiBi, and Baichuan as it was published."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from saap import SaapError, discover, load, prune, save, to_groupwise
from saap.models.modeling_baichuan import SaapBaichuanConfig, SaapBaichuanForCausalLM
from tests.saap.models.families import (
    BAICHUAN,
    BLOOM,
    GATED,
    IDS,
    LAYERS,
    SMALL,
    assert_same_bits,
    build,
    logits,
    publish_baichuan,
    random_keep,
)
from tests.saap.models.layouts import layers, silenced


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_static_cache_much_longer_than_the_text_changes_nothing_in_half_precision(dtype):
    """Counted from its end, distances would be thousands, which half precision holds to whole numbers at best."""
    model = build("baichuan-13b, 12 heads")
    small = prune(model, random_keep(model)).to(dtype)
    cache = StaticCache(config=small.config, max_cache_len=4096)
    with torch.no_grad():
        again = torch.cat([small(part, past_key_values=cache).logits for part in IDS.split([9, 1, 3], 1)], 1)
        torch.testing.assert_close(again, small(IDS).logits, rtol=0, atol=0.02 if dtype == torch.float16 else 0.15)
