"""GGUF files run by llama.cpp itself, against the same checkpoint in torch."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saap import SaapError, dequantize, discover, load_tokenizer, prune, save, select, to_groupwise, weight_norms
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from saap.models.modeling import GroupwiseLinear
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
TEXT = "It's 1984!  And 42 ships — “gone”.\n\n   The keeper’s lamp\tburned… 3,141 times; naïve 中文 🚢 done "


def pruned(case):
    return prune(build(case), random_keep(build(case)))


def with_output_biases(model):
    """As compensated pruning leaves it: a bias on o_proj and down_proj of every layer."""
    model.config.output_bias = True
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features) / 2)
    return model


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


def exported(model, tokenizer, folder, **settings):
    save(model, folder, tokenizer)
    return export_gguf(folder, folder / "model.gguf", **settings), folder / "model.gguf"


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


def settings_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_tokens_specials_and_template_of_a_byte_level_tokenizer(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    _, file = exported(build("llama"), tokenizer, tmp_path)
    found = settings_of(file)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    with LlamaCpp(file) as other:
        assert other.tokenize(TEXT) == tokenizer(TEXT)["input_ids"]
        assert other.tokenize("<s>a</s>") == tokenizer("<s>a</s>")["input_ids"]


def llama_regex(digits):
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    return words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cut_by(pattern):
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("name", "cut", "whole_words"),
    [
        ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
        ("qwen2", cut_by(llama_regex(r"\p{N}")), False),
        ("llama-bpe", cut_by(llama_regex(r"\p{N}{1,3}")), True),
    ],
)
def test_text_is_cut_as_the_tokenizer_cuts_it(name, cut, whole_words, tiny_folder, mini, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["pre_tokenizer"] = json.loads(cut.__getstate__())
    parts["model"]["ignore_merges"] = whole_words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="</s>")
    _, file = exported(build("llama"), tokenizer, tmp_path)
    assert settings_of(file)["tokenizer.ggml.pre"] == name
    with LlamaCpp(file) as other:
        for text in (TEXT, *(row["text"] for row in mini("wikitext2_raw/test")[:20])):
            assert other.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.fixture(params=["normaliser", "metaspace"])
def sentencepiece_like(mini, request):
    """A BPE with bytes as fallback, its merges ordered by the piece they make, as LLaMA's conversion orders them."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([row["text"] for row in mini("bookcorpus_like/passages")], trainer)
    parts = json.loads(bpe.to_str())
    vocabulary = parts["model"]["vocab"]
    cuts = (
        (word[:i], word[i:], index) for word, index in vocabulary.items() if index > 258 for i in range(1, len(word))
    )
    merges = sorted((index, vocabulary[a], a, b) for a, b, index in cuts if a in vocabulary and b in vocabulary)
    parts["model"]["merges"] = [[a, b] for _, _, a, b in merges]
    if request.param == "metaspace":  # the same, as newer files of LLaMA say it
        parts["normalizer"] = None
        parts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < 3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_text_is_cut_as_a_sentencepiece_like_tokenizer_cuts_it(sentencepiece_like, mini, tmp_path):
    _, file = exported(build("llama"), sentencepiece_like, tmp_path)
    with LlamaCpp(file) as other:
        for text in (TEXT, *(row["text"] for row in mini("wikitext2_raw/test")[:40])):
            # before a text that begins with a space, SentencePiece and llama.cpp put another, Metaspace does not
            text = text.lstrip()
            assert other.tokenize(text) == sentencepiece_like(text)["input_ids"]


def refused(model, tokenizer, folder, message, **settings):
    save(model, folder, tokenizer)
    with pytest.raises(SaapError, match=message):
        export_gguf(folder, folder / "model.gguf", **settings)
    assert not list(folder.glob("*.gguf*"))
    assert not list(folder.glob(".*.partial"))


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


def test_a_tokenizer_that_llama_cpp_would_cut_differently_is_refused(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    for number, cut in enumerate((cut_by(r"\w+|\W+"), pre_tokenizers.ByteLevel(add_prefix_space=True))):
        other = copy.deepcopy(tokenizer)
        other.backend_tokenizer.pre_tokenizer = cut
        refused(build("llama"), other, tmp_path / str(number), "cut text")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    refused(build("llama"), PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "words", "WordLevel")


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
