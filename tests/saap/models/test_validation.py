"""Checkpoints made with bad intent are refused in one line: nothing in them was run, read or allocated."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saap import SaapError, discover, load, load_tokenizer, prune, save, to_groupwise
from tests.saap.models.families import build

EVIL = "raise SystemExit('code of a checkpoint was run')"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def uneven(tiny_llama, tmp_path):
    model = tiny_llama()
    save(prune(model, np.arange(len(discover(model))) % 2 == 0), tmp_path / "uneven")
    return tmp_path / "uneven"


def refused(read, folder, *words):
    with pytest.raises(SaapError) as caught:
        read(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("model_type", ["llama", "saap_llama", "stranger"])
def test_code_beside_the_weights_is_never_run(folder, model_type):
    (folder / "code.py").write_text(EVIL)
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(folder / "config.json", model_type=model_type, auto_map=auto_map)
    if model_type == "stranger":
        refused(load, folder, model_type)
    else:  # an uneven config whose layers are equal is a plain model
        load(folder)


def test_codes_in_other_groups_than_config_says_are_refused_by_name(tmp_path):
    save(to_groupwise(build("llama"), 32), tmp_path)
    change(tmp_path / "config.json", groupwise={"bits": 4, "group_size": 64})
    refused(load, tmp_path, "mismatched", "down_proj.scale [64, 3] for [64, 2]")


def test_code_of_a_tokenizer_is_never_run(folder):
    (folder / "code.py").write_text(EVIL)
    auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="StrangeTokenizer")
    (folder / "tokenizer.json").unlink()
    refused(load_tokenizer, folder, "tokenizer")


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(load_tokenizer, folder, "no tokenizer")


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 10**12},
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": 10**12},
        {"intermediate_size": 10**30},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 4000},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"rope_parameters": {"rope_type": "no such"}},
        {"hidden_act": "no such"},
        {"dtype": "float7"},
    ],
    ids=str,
)
def test_absurd_sizes_and_values_are_refused_before_memory_is_taken(folder, fields):
    change(folder / "config.json", **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(load, folder, str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("widths", [{"intermediate_size": 10**12}, {"num_key_value_heads": 10**9}], ids=str)
def test_absurd_widths_of_one_block_are_refused(uneven, widths):
    per_layer = json.loads((uneven / "config.json").read_text())["per_layer_config"]
    per_layer["3"] |= widths
    change(uneven / "config.json", per_layer_config=per_layer)
    refused(load, uneven, str(uneven))


def test_deeply_nested_json_is_refused(folder):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    refused(load, folder, "config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": "stranger/kernel"},
        {"per_layer_config": {"0": {"attn_implementation": "stranger/kernel"}}},
    ],
    ids=str,
)
def test_a_config_that_asks_for_code_from_the_hub_is_refused(folder, fields):
    change(folder / "config.json", **fields)
    refused(load, folder, "stranger/kernel")


@pytest.mark.parametrize(
    "fields",
    [{"quantization_config": {"quant_method": "bitsandbytes"}}, {"transformers_weights": "../model.safetensors"}],
    ids=str,
)
def test_weights_in_another_format_or_place_are_refused(folder, fields):
    change(folder / "config.json", **fields)
    refused(load, folder, str(folder))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 7, "gone.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder, name):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "a").mkdir()
    save_file(state, folder / "a" / "b.safetensors")
    save_file({}, folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(load, folder, "index.json", str(name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    refused(load, folder, "index.json")


def test_an_adapter_that_names_another_model_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../elsewhere"}))
    refused(load, folder, "adapter")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats_are_refused(folder, dtype):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(load, folder, "model.norm.weight", "dtype")


def test_codes_that_are_no_bytes_are_refused(tiny_llama, tmp_path):
    save(to_groupwise(tiny_llama(), 32), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(n for n in state if n.endswith(".codes"))
    state[name] = state[name].float()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(load, tmp_path, name)


def test_a_dtype_that_does_not_exist_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"Q77"'))
    refused(load, folder, "damaged")


def test_a_bloom_with_absurd_heads_is_refused(tmp_path):
    model = build("bloom")
    save(prune(model, np.ones(len(discover(model)), bool)), tmp_path)
    per_layer = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    per_layer["0"]["kept_heads"] = list(range(10**5))
    change(tmp_path / "config.json", per_layer_config=per_layer)
    refused(load, tmp_path, str(tmp_path))
