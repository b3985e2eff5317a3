"""GGUF files run by llama.cpp itself, against the same checkpoint in torch."""

import copy

import gguf
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from saap import SaapError, dequantize, discover, prune, select, to_groupwise, weight_norms
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from saap.models.modeling_groupwise import GroupwiseLinear
from tests.saap.export.gguf_files import exported, pruned, refused, with_output_biases
from tests.saap.models.families import GATED, SMALL, build, random_keep

IDS = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(5)).tolist()
TOKENS = {"f32": 256, "f16": 2048, "q4_1": 512}  # of the real model's perplexity; llama.cpp's f32 and q4_1 are slow
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def rescaled(rope):
    torch.manual_seed(0)
    fields = SMALL | GATED | {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": lambda: pruned("llama"),
    "dense llama": lambda: build("llama"),
    "mistral, wide heads": lambda: pruned("mistral, wide heads"),
    "qwen2": lambda: pruned("qwen2"),
    "llama, by query heads": lambda: pruned("llama, by query heads"),
    "biases on the outputs": lambda: with_output_biases(pruned("llama")),
    "rope scaled as llama 3": lambda: rescaled(LLAMA3 | {"original_max_position_embeddings": 32}),
    "rope scaled linearly": lambda: rescaled({"rope_type": "linear", "factor": 4.0}),
}


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def greedy_of(model, ids, count):
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_what_torch_does(case, tiny_tokenizer, tmp_path):
    model = MODELS[case]()
    expected = logits_of(model)
    for floats, tolerance in (("f32", 2e-5), ("f16", 0.02)):
        _, file = exported(model, tiny_tokenizer, tmp_path, floats=floats)
        with LlamaCpp(file, context=128, exact=True) as other:
            np.testing.assert_allclose(other.logits(IDS), expected, atol=tolerance * np.abs(expected).max())
            if floats == "f32":
                assert other.greedy(IDS, 24) == greedy_of(model, IDS, 24)


def test_channels_of_float_models_come_in_whole_blocks_too(tiny_tokenizer, tmp_path):
    """llama-quantize makes no Q4_0, Q4_1 or Q8_0 of a file that has one row that 32 does not divide."""
    model = pruned("llama")
    _, file = exported(model, tiny_tokenizer, tmp_path, floats="f32")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert any(width % 32 for width in widths)
    for layer, (block, width) in enumerate(zip(model.model.layers, widths, strict=True)):
        down, up = stored[f"blk.{layer}.ffn_down.weight"], stored[f"blk.{layer}.ffn_up.weight"]
        assert down.shape[1] == up.shape[0] == -(-width // 32) * 32
        assert np.array_equal(down[:, :width], block.mlp.down_proj.weight.detach().numpy())
        assert np.array_equal(up[:width], block.mlp.up_proj.weight.detach().numpy())
        assert not down[:, width:].any()
        assert not up[width:].any()


def test_a_sliding_window_bounds_the_context(tiny_tokenizer, tmp_path):
    model = pruned("mistral, sliding window, one KV head")
    _, file = exported(model, tiny_tokenizer, tmp_path, floats="f32")
    assert gguf.GGUFReader(file).get_field("deci.context_length").contents() == 5
    with LlamaCpp(file, context=32, exact=True) as other:
        np.testing.assert_allclose(other.logits(IDS[:5]), logits_of(model, IDS[:5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "group_size"), [("llama", 32), ("biases on the outputs", 64), ("qwen2", 128)])
def test_int4_codes_scales_and_zeros_arrive_bit_for_bit(case, group_size, tiny_tokenizer, tmp_path):
    model = to_groupwise(MODELS[case](), group_size)
    done, file = exported(model, tiny_tokenizer, tmp_path, floats="f32")
    assert (done.tensors["Q4_1"], done.unpacked) == (28, ())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    widths = [module.mlp.down_proj.in_features for module in model.model.layers]
    assert any(width % 32 for width in widths)
    for layer, module in enumerate(model.model.layers):
        for path, name in (
            ("mlp.down_proj", "ffn_down"),
            ("mlp.up_proj", "ffn_up"),
            ("self_attn.o_proj", "attn_output"),
        ):
            linear, tensor = module.get_submodule(path), stored[f"blk.{layer}.{name}.weight"]
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(weight[: linear.out_features, : linear.in_features], linear.weight().numpy())
            assert not weight[linear.out_features :].any()
    # against torch, whose activations are not rounded to int8, only the size of the difference can be held
    with LlamaCpp(file, context=128, exact=True) as other:
        found, expected = other.logits(IDS), logits_of(model)
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()
    plain = np.abs(logits_of(MODELS[case]()) - expected).mean()
    assert np.abs(found - expected).mean() < plain


def test_a_matrix_whose_inputs_do_not_divide_by_32_becomes_floats(tiny_tokenizer, tmp_path):
    dense = build("mistral, wide heads")  # of 24 inputs each
    keep = random_keep(dense)
    keep[:2] = True, False
    model = to_groupwise(prune(dense, keep), 32)
    done, file = exported(model, tiny_tokenizer, tmp_path, floats="f32")
    odd = [i for i, b in enumerate(model.model.layers) if b.self_attn.o_proj.in_features % 32]
    assert odd
    assert done.unpacked == tuple(f"blk.{layer}.attn_output.weight" for layer in odd)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    weight = model.model.layers[odd[0]].self_attn.o_proj.weight().numpy()
    assert np.array_equal(stored[done.unpacked[0]].reshape(weight.shape), weight)


@pytest.mark.parametrize("form", [{"group_size": 20}, {"group_size": 32, "bits": 3}, {"group_size": None, "groups": 2}])
def test_codes_that_q4_1_cannot_hold_become_floats_of_the_same_values(form, tiny_tokenizer, tmp_path):
    model = to_groupwise(pruned("llama"), **form)
    done, file = exported(model, tiny_tokenizer, tmp_path, floats="f32")
    kept = done.tensors.get("Q4_1", 0)
    assert kept + len(done.unpacked) == 28
    assert bool(kept) == ("groups" in form)  # two groups are 32 wide where there are 64 inputs
    with LlamaCpp(file, context=128, exact=True) as other:
        scale = np.abs(logits_of(model)).max()
        np.testing.assert_allclose(other.logits(IDS), logits_of(model), atol=(0.1 if kept else 2e-5) * scale)


def test_what_llama_cpp_cannot_run_is_refused_and_leaves_nothing(tiny_tokenizer, tmp_path):
    refused(pruned("qwen3"), tiny_tokenizer, tmp_path / "a", "qwen3")
    for case in ("gemma3, one KV head, capped", "smollm3", "granite", "phi3", "glm4", "olmo2", "cohere2"):
        refused(pruned(case), tiny_tokenizer, tmp_path / case[:5], f"{case.split(',')[0]}.*`saap export uniform`")
    refused(pruned("bloom"), tiny_tokenizer, tmp_path / "b", "bloom")
    refused(rescaled({"rope_type": "yarn", "factor": 4.0}), tiny_tokenizer, tmp_path / "d", "yarn")
    big, broken = pruned("llama"), pruned("llama")
    with torch.no_grad():
        big.model.layers[2].mlp.up_proj.weight[0, 0] = 1e6
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    refused(big, tiny_tokenizer, tmp_path / "e", "blk.2.ffn_up.weight.*f32")
    refused(broken, tiny_tokenizer, tmp_path / "f", "not finite", floats="f32")
    refused(pruned("llama"), tiny_tokenizer, tmp_path / "g", "f16", floats="q8_0")
    torch.nn.Module.register_buffer(broken.model, "extra", torch.zeros(3))
    refused(broken, tiny_tokenizer, tmp_path / "h", "model.extra", floats="f32")
    with pytest.raises(SaapError, match="no folder"):
        export_gguf(tmp_path / "g", tmp_path / "nowhere" / "model.gguf")


def mean_loss(logits, ids):
    return F.cross_entropy(torch.from_numpy(logits)[:-1], torch.tensor(ids[1:]), reduction="sum").item() / (
        len(ids) - 1
    )


@pytest.mark.slow
def test_a_real_pruned_and_recovered_model_in_llama_cpp(smollm2, mini, tmp_path):
    model, tokenizer = smollm2
    groups = discover(model)
    small = prune(model, select(weight_norms(model) / groups.parameters, groups, 0.06))
    int4 = to_groupwise(small, 64)
    text = "\n\n".join(row["text"] for row in mini("wikitext2_raw/test"))
    ids = tokenizer(text)["input_ids"]
    windows = [ids[start : start + 256] for start in range(0, max(TOKENS.values()), 256)]
    found = {}
    for name, ours, floats in (("f32", small, "f32"), ("f16", small, "f16"), ("q4_1", int4, "f16")):
        (tmp_path / name).mkdir()
        _, file = exported(ours, tokenizer, tmp_path / name, floats=floats)
        with LlamaCpp(file, context=256, exact=True) as other:
            assert other.tokenize(text) == ids
            logits = [other.logits(window) for window in windows[: TOKENS[name] // 256]]
            found[name] = [mean_loss(*pair) for pair in zip(logits, windows, strict=False)], logits[0]
            if name != "q4_1":
                assert other.greedy(ids[:32], 16) == greedy_of(small, ids[:32], 16)
    for ours, names in ((small, ("f16", "f32")), (dequantize(copy.deepcopy(int4)), ("q4_1",))):
        logits = [logits_of(ours, window) for window in windows[: TOKENS[names[0]] // 256]]
        expected = [mean_loss(*pair) for pair in zip(logits, windows, strict=False)]
        for name in names:
            tolerance, closeness = {"f32": (1e-5, 1e-5), "f16": (2e-2, 1e-3), "q4_1": (2e-2, 3e-2)}[name]
            losses, first = found[name]
            error, largest = np.abs(first - logits[0]), np.abs(logits[0]).max()
            # activations rounded to int8 leave single logits far off
            assert (error.mean() if name == "q4_1" else error.max()) < tolerance * largest
            assert np.exp(np.mean(losses)) == pytest.approx(np.exp(np.mean(expected[: len(losses)])), rel=closeness)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q4_1" / "model.gguf").tensors}
    packed = 0
    for layer, module in enumerate(int4.model.layers):
        rotated = {"q_proj": module.self_attn.config.num_attention_heads}
        rotated |= {"k_proj": module.self_attn.config.num_key_value_heads}
        for path, linear in module.named_modules():
            if isinstance(linear, GroupwiseLinear):
                tensor, name = stored[f"blk.{layer}.{NAMES[path]}.weight"], path.split(".")[1]
                weight = gguf.dequantize(tensor.data, tensor.tensor_type)
                if name in rotated:  # undo the interleaving of rotary pairs
                    weight = weight.reshape(rotated[name], 32, 2, -1).swapaxes(1, 2).reshape(weight.shape)
                assert np.array_equal(weight, linear.weight().numpy()), (layer, path)
                packed += weight.size
    assert packed > 40_000_000
