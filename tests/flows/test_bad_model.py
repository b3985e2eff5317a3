"""Models that cannot be run, and runs that a model cannot make: refused in one line before anything is computed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, PreTrainedTokenizerFast

from flows.commands import app
from saap import load, load_tokenizer, save, to_groupwise
from tests.flows.bad_input import RUNNER, assert_refused, settings
from tests.saap.models.families import build, publish_baichuan

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def text(name, content):
    def change(folder):
        file = folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def fields(name="config.json", **values):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def cut(name, end):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:end])

    return change


def tensors(alter):
    def change(folder):
        state = load_file(folder / WEIGHTS)
        alter(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def renamed(new):
    return lambda folder: (folder / WEIGHTS).rename(folder / new)


def replaced(name, make):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def index_of(content):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def int4(folder):
    small, tokenizer = to_groupwise(load(folder), 32), load_tokenizer(folder)
    shutil.rmtree(folder)
    save(small, folder, tokenizer)


def no_end(folder):
    fields("tokenizer_config.json", eos_token=None)(folder)
    fields(eos_token_id=None)(folder)
    fields("generation_config.json", eos_token_id=None)(folder)


def more_tokens(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(600)])
    tokenizer.save_pretrained(folder)


NORM, HEAD = "model.norm.weight", "lm_head.weight"
FOLDERS = {
    "nothing in it": (lambda folder: [file.unlink() for file in folder.iterdir()], ["config.json"]),
    "no config": (without("config.json"), ["no config.json"]),
    "config empty": (text("config.json", ""), ["config.json", "JSON"]),
    "config is text": (text("config.json", "hello"), ["config.json", "JSON"]),
    "config is a list": (text("config.json", "[]"), ["config.json", "JSON object"]),
    "config is null": (text("config.json", "null"), ["config.json", "JSON object"]),
    "config is cut": (cut("config.json", 50), ["config.json", "JSON"]),
    "config in latin-1": (text("config.json", '{"a": "ö"}'.encode("latin-1")), ["config.json", "UTF-8"]),
    "config is deep": (text("config.json", "[" * 10**5), ["config.json"]),
    "config is a folder": (replaced("config.json", os.mkdir), ["no config.json"]),
    "config is a pipe": (replaced("config.json", os.mkfifo), ["no config.json"]),
    "no model type": (text("config.json", "{}"), ["not supported", "llama"]),
    "gpt2": (fields(model_type="gpt2"), ["'gpt2'", "not supported", "llama"]),
    "falcon": (fields(model_type="falcon"), ["'falcon'", "not supported"]),
    "a number for a type": (fields(model_type=3), ["'3'", "not supported"]),
    "gptq": (fields(quantization_config={"quant_method": "gptq"}), ["quantised already (gptq)", "float weights"]),
    "awq": (fields(quantization_config={"quant_method": "awq"}), ["quantised already (awq)"]),
    "bitsandbytes": (fields(quantization_config={"quant_method": "bitsandbytes"}), ["(bitsandbytes)"]),
    "fp8": (fields(quantization_config={"quant_method": "fp8"}), ["(fp8)"]),
    "quantised somehow": (fields(quantization_config={"bits": 4}), ["quantised already"]),
    "our own int4": (int4, ["int4 codes", "saap export uniform"]),
    "weights of elsewhere": (fields(transformers_weights="../x.safetensors"), ["transformers_weights"]),
    "kernels of elsewhere": (fields(attn_implementation="org/kernel"), ["org/kernel"]),
    "no weights": (without(WEIGHTS), ["no model.safetensors"]),
    "weights by another name": (renamed("weights.safetensors"), ["no model.safetensors"]),
    "a pickle": (renamed("pytorch_model.bin"), ["no model.safetensors", "pickles"]),
    "weights empty": (text(WEIGHTS, ""), [WEIGHTS, "damaged"]),
    "weights are zeros": (text(WEIGHTS, b"\0" * 1000), [WEIGHTS, "damaged"]),
    "weights are text": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1"), [WEIGHTS, "damaged"]),
    "weights cut": (cut(WEIGHTS, -100), [WEIGHTS, "damaged"]),
    "weights cut in the header": (cut(WEIGHTS, 100), [WEIGHTS, "damaged"]),
    "weights are a folder": (replaced(WEIGHTS, os.mkdir), [WEIGHTS, "no regular file"]),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), [WEIGHTS, "no regular file"]),
    "weights are a link to nothing": (replaced(WEIGHTS, lambda file: file.symlink_to("gone")), ["no model"]),
    "weights are endless": (replaced(WEIGHTS, lambda file: file.symlink_to("/dev/zero")), ["no regular file"]),
    "an adapter": (text("adapter_config.json", "{}"), ["adapter", "merge"]),
    "index of nothing": (index_of({"weight_map": {}}), [INDEX, "no files"]),
    "index is a list": (index_of("[]"), [INDEX, "get it again"]),
    "index is broken": (index_of("{"), [INDEX, "get it again"]),
    "index without a map": (index_of({"metadata": {}}), [INDEX, "get it again"]),
    "index of numbers": (index_of({"weight_map": {"a": 1}}), [INDEX, "1"]),
    "index leads out": (index_of({"weight_map": {"a": "../x.safetensors"}}), [INDEX, "../x.safetensors"]),
    "index of a missing part": (index_of({"weight_map": {"a": "model-2.safetensors"}}), ["model-2", "missing"]),
    "integers for weights": (tensors(lambda s: s.update({NORM: s[NORM].to(torch.int32)})), [NORM, "I32"]),
    "a tensor missing": (tensors(lambda s: s.pop(NORM)), ["do not fit"]),
    "a tensor too many": (tensors(lambda s: s.update(extra=torch.ones(3))), ["extra", "unexpected"]),
    "a tensor renamed": (tensors(lambda s: s.update(x=s.pop(NORM))), [NORM, "missing"]),
    "a tensor of another shape": (tensors(lambda s: s.update({NORM: torch.ones(65)})), [NORM, "[65] for [64]"]),
    "a layer more": (fields(num_hidden_layers=7), ["do not fit"]),
    "a layer less": (fields(num_hidden_layers=5), ["do not fit", "model.layers.5"]),
    "no layers": (fields(num_hidden_layers=0), ["config.json"]),
    "layers without end": (fields(num_hidden_layers=10**6), ["1000000 layers"]),
    "wider": (fields(hidden_size=128), ["do not fit"]),
    "wider by far": (fields(hidden_size=2**24), ["config.json"]),
    "more words": (fields(vocab_size=10**9), ["do not fit"]),
    "heads that do not divide": (fields(num_attention_heads=5), ["config.json"]),
    "no heads": (fields(num_attention_heads=0), ["config.json"]),
    "other heads": (fields(num_key_value_heads=4), ["do not fit"]),
    "an activation nobody knows": (fields(hidden_act="magic"), ["config.json", "magic"]),
    "a size that is a text": (fields(hidden_size="64"), ["config.json", "hidden_size"]),
    "a size that is null": (fields(intermediate_size=None), ["config.json"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["no tokenizer"]),
    "tokenizer empty": (text("tokenizer.json", ""), ["tokenizer", "read"]),
    "tokenizer cut": (cut("tokenizer.json", 500), ["tokenizer", "read"]),
    "tokenizer is a pipe": (replaced("tokenizer.json", os.mkfifo), ["tokenizer.json", "no regular file"]),
    "tokenizer config broken": (text("tokenizer_config.json", "{"), ["tokenizer", "read"]),
    "more tokens than embeddings": (more_tokens, ["1112 tokens", "512"]),
    "no end of text": (no_end, ["end-of-text", "recovery", "lm-eval", "eos_token"]),
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_model_we_can_prune_is_refused(config, store, folder, name):
    change, words = FOLDERS[name]
    change(folder)
    assert_refused(words, "plan", config, "--set", f"model.path={folder}")
    assert not list(store.glob("*/*/manifest.json"))


def test_a_tokenizer_that_llama_cpp_has_not_is_refused_before_anything_runs(config, folder):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    own = settings([f"model.path={folder}", "calibrate.own=0", "recover.own=0"])
    assert_refused(["WordLevel", "GGUF"], "plan", config, *own, *settings(["speed.llama_cpp=true"]))


def test_a_tokenizer_without_an_end_will_do_where_none_is_needed(config, folder):
    no_end(folder)
    asked = ["plan", config, *settings([f"model.path={folder}", "recover.recipe=none"])]
    assert_refused(["end-of-text"], *asked)
    done = RUNNER.invoke(app, [*map(str, asked), "--set", "evaluate.benchmarks=['wikitext2']"])
    assert done.exit_code == 0, done.exception


def test_a_window_that_has_no_place_behind_the_bos_that_the_tokenizer_adds(config, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    asked = ["plan", config, *settings([f"model.path={folder}", "evaluate.windows=[256]"])]
    assert RUNNER.invoke(app, list(map(str, asked))).exit_code == 0  # LLaMA's windows have none
    fields("config.json", model_type="mistral", architectures=["MistralForCausalLM"])(folder)
    assert_refused(["evaluate.windows", "256 positions behind a BOS"], *asked)
    done = RUNNER.invoke(app, list(map(str, [*asked, *settings(["evaluate.bos=never"])])))
    assert done.exit_code == 0, done.exception


def test_a_token_for_the_beginning_that_is_not_there_cannot_be_asked_for(config, folder):
    fields("tokenizer_config.json", bos_token=None)(folder)
    asked = ["plan", config, *settings([f"model.path={folder}", "evaluate.bos=always"])]
    assert_refused(["no BOS token", "evaluate.bos", "bos_token"], *asked)
    for more in (["evaluate.bos=auto"], ["evaluate.benchmarks=['arc_easy']"], ["evaluate.variants=[]"]):
        done = RUNNER.invoke(app, list(map(str, [*asked, *settings(more)])))
        assert done.exit_code == 0, done.exception


def test_a_baichuan_does_not_stay_on_disk(config, folder, tmp_path):
    model = build("baichuan-13b, 12 heads")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    publish_baichuan(model, folder, model_max_length=256)
    plan = ["plan", config, "--set", "recover.recipe=none", "--set"]
    assert_refused(
        ["compute.offload", "Baichuan", "saap.save"], *plan, f"model.path={folder}", "--set", "compute.offload=true"
    )
    save(load(folder), tmp_path / "split", load_tokenizer(folder))
    for place, offload in ((folder, "false"), (tmp_path / "split", "true")):
        done = RUNNER.invoke(app, list(map(str, [*plan, f"model.path={place}", "--set", f"compute.offload={offload}"])))
        assert done.exit_code == 0, done.exception
    assert load(tmp_path / "split", offload=True)


def test_a_bloom_is_refused_for_int4_and_llama_cpp_and_taken_without(config, folder):
    small = BloomConfig(vocab_size=512, hidden_size=64, n_layer=6, n_head=4)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    asked = ["plan", config, "--set", f"model.path={folder}"]
    assert_refused(["bloom", "recover.recipe", "lora"], *asked)
    assert_refused(["bloom", "llama.cpp"], *asked, "--set", "recover.recipe=none", "--set", "speed.llama_cpp=true")
    assert RUNNER.invoke(app, list(map(str, [*asked, "--set", "recover.recipe=none"]))).exit_code == 0
