"""Checkpoints as other people leave them: saap must load the model that transformers loads."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, Qwen2Config

from saap import SaapError, discover, load, load_tokenizer, prune, save, to_groupwise
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from saap.export.uniform import export_uniform
from saap.models.checkpoint import load_config
from saap.models.validation import weight_files
from storage.keys import Fingerprints
from tasks.config import ConfigError
from tasks.model_source import model_source

SIZES = {"vocab_size": 520, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def merged(tiny_folder, tmp_path):
    """A Qwen2 whose config says tied while the file holds another head: what merging an adapter may leave."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=False)
    folder = shutil.copytree(tiny_folder, tmp_path / "merged")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    change(folder / "config.json", tie_word_embeddings=True)
    return folder


@torch.no_grad()
def test_the_stored_head_is_used_everywhere_whatever_the_config_says(merged, tmp_path, caplog):
    ids = torch.arange(5, 45)[None]
    expected = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits

    def apart(found):
        return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())

    model = load(merged)
    said = [record.message for record in caplog.records if record.name == "saap"]
    assert len(said) == 1
    assert f"{merged}/config.json says tie_word_embeddings" in said[0]
    assert apart(model(ids).logits) < 1e-5
    everything = np.ones(len(discover(model)), bool)
    assert apart(prune(model, everything)(ids).logits) < 1e-5
    assert apart(to_groupwise(model, 32, bits=8)(ids).logits) < 0.02
    save(prune(model, everything), tmp_path / "pruned", load_tokenizer(merged))
    for kept in (merged, tmp_path / "pruned"):
        export_uniform(kept, tmp_path / "even" / kept.name)
        even = AutoModelForCausalLM.from_pretrained(tmp_path / "even" / kept.name).eval()
        assert apart(even(ids).logits) < 1e-5
    export_gguf(tmp_path / "pruned", tmp_path / "m.gguf", floats="f32")
    with LlamaCpp(tmp_path / "m.gguf", context=64, exact=True) as other:
        assert apart(other.logits(ids[0].tolist())[None]) < 1e-4


def test_a_head_that_equals_the_embeddings_stays_tied(merged):
    state = load_file(merged / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    assert load_config(merged).tie_word_embeddings
    model = load(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bloom_with_a_head_of_its_own_is_read_with_it(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=True)
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    model = load(tmp_path)
    assert torch.equal(prune(model, np.ones(len(discover(model)), bool)).lm_head.weight, head)


def test_a_model_once_cut_with_the_wrong_head_has_another_key_now(merged, tmp_path):
    fingerprints = Fingerprints(tmp_path)
    before = model_source(str(merged), None, fingerprints)
    plain = fingerprints.files({name: merged / name for name in ("config.json", "model.safetensors")})
    assert before.weights != plain
    change(merged / "config.json", tie_word_embeddings=False)
    plain = fingerprints.files({name: merged / name for name in ("config.json", "model.safetensors")})
    assert model_source(str(merged), None, fingerprints).weights == plain


def test_the_index_decides_which_files_are_the_model(folder, tmp_path):
    load(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values())
    assert len(named) > 1
    before = model_source(str(folder), None, Fingerprints(tmp_path))
    logits = load(folder)(torch.arange(9)[None]).logits
    # Mistral's own layout beside transformers': other names, other dtype; it must not be read
    save_file({"tok_embeddings.weight": torch.ones(9, dtype=torch.int64)}, folder / "consolidated.safetensors")
    assert {file.name for file in weight_files(folder)} == named
    assert model_source(str(folder), None, Fingerprints(tmp_path)) == before
    assert torch.equal(load(folder)(torch.arange(9)[None]).logits, logits)
    export_gguf(folder, tmp_path / "m.gguf")
    (folder / sorted(named)[0]).unlink()
    with pytest.raises(ConfigError, match="missing"):
        model_source(str(folder), None, Fingerprints(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(folder, tmp_path, name):
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "tokenizer.json":
        (folder / "x.safetensors").rename(folder / "model.safetensors")
    else:
        with pytest.raises(SaapError, match=f"{name} is no regular file"):
            load(folder)
    with pytest.raises(ConfigError, match=f"{name} is no regular file"):
        model_source(str(folder), None, Fingerprints(tmp_path))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/tool.jinja", "generation_config.json"]
)
def test_what_a_checkpoint_carries_along_has_a_fingerprint(folder, tmp_path, name):
    def source():
        return model_source(str(folder), None, Fingerprints(tmp_path))

    before = source()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"max_length": 30}')
    after = source()
    assert after.extras != before.extras
    assert (after.weights, after.tokenizer) == (before.weights, before.tokenizer)


def test_a_tokenizer_without_an_end_takes_the_configs(folder):
    change(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for number, token in ((2, "</s>"), ([1, 2], "<s>"), (10**6, None), (None, None)):
        change(folder / "generation_config.json", eos_token_id=number)
        change(folder / "config.json", eos_token_id=None)
        assert load_tokenizer(folder).eos_token == token
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=2)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("wanted", ["flash_attention_2", "flash_attention_3", "flex_attention", "nonsense"])
def test_an_attention_that_is_not_here_gives_way_to_sdpa_with_a_line(folder, caplog, field, wanted):
    expected = load(folder)(torch.arange(9)[None]).logits
    change(folder / "config.json", **{field: wanted})
    model = load(folder)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.arange(9)[None]).logits, expected)
    assert wanted in caplog.text


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(folder, method):
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(SaapError, match=f"quantised already.*{method}.*float weights"):
        load(folder)
