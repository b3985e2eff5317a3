import json
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saap import SaapError, discover, load, load_tokenizer, prune, save, to_groupwise


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(folder, **settings):
    """The message of the SaapError that loading raises, which is one line."""
    with pytest.raises(SaapError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_missing_folder_and_a_missing_config_are_named(folder, tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    assert "config.json" in refused(folder)


def test_a_folder_without_safetensors_is_refused_even_with_a_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, share):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 128},
        {"vocab_size": 600},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 7},
        {"num_hidden_layers": 5},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(folder, fields):
    change_config(folder, **fields)
    assert str(folder) in refused(folder)


def test_an_uneven_config_that_disagrees_with_the_tensors_is_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    save(prune(model, np.arange(len(discover(model))) % 2 == 0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"]["3"]["intermediate_size"] += 1
    change_config(tmp_path, **config)
    assert str(tmp_path) in refused(tmp_path)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)).save_pretrained(tmp_path)
    assert "gpt2" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_load_in_the_dtype_asked_for(tiny_llama, folder, dtype):
    expected = getattr(torch, dtype)
    model, dense = load(folder, dtype=dtype), tiny_llama().state_dict()
    assert not model.training
    assert all(torch.equal(tensor, dense[name].to(expected)) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_keeps_the_dtype_it_was_saved_in(tiny_llama, tmp_path, dtype):
    model = tiny_llama().to(getattr(torch, dtype))
    save(model, tmp_path)
    state = load(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_says_who_may_read_the_weights(tiny_llama, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save(tiny_llama(), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int4_codes_scales_and_zeros_are_the_same_in_every_dtype(tiny_llama, tmp_path, dtype):
    small = to_groupwise(tiny_llama(), 32)
    save(small, tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert again.lm_head.weight.dtype == getattr(torch, dtype)
    state = again.state_dict()
    for name, tensor in small.state_dict().items():
        expected = tensor if name.rpartition(".")[2] in ("codes", "scale", "zero") else tensor.to(getattr(torch, dtype))
        assert state[name].dtype == expected.dtype, name
        assert torch.equal(state[name], expected), name


def test_an_unknown_dtype_is_refused(folder):
    assert "int3" in refused(folder, dtype="int3")


def test_a_tokenizer_travels_with_the_model_and_can_pad(tiny_folder, tmp_path):
    save(load(tiny_folder), tmp_path / "saved", load_tokenizer(tiny_folder))
    text = "The wind had gone round to the north — 42 times."
    expected = load_tokenizer(tiny_folder)(text)["input_ids"]
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(SaapError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_device_that_nothing_here_computes_on_is_refused(folder):
    with pytest.raises(SaapError, match="'cpu' or 'cuda', not on 'mps'"):
        load(folder, device="mps")
