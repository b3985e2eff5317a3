"""Runs and sweeps that cannot be: refused in one line before anything is computed, wherever they would start."""

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from flows.commands import app
from flows.run import saap_run
from flows.sweep import saap_sweep
from saap.errors import SaapError
from storage.keys import Fingerprints
from tasks.config import ConfigError
from tasks.data import mini_folder
from tasks.model_source import EMBEDDED, model_source
from tests.flows.bad_input import RUNNER, assert_refused, refused, settings

RUNS = [
    (["prune.protect=[6]"], ["protect", "layer 6", "6 layers"]),
    (["prune.protect=[-7]"], ["protect", "-7"]),
    (["prune.ratio=0.99"], ["0.99", "cannot be reached"]),
    (["prune.ratio=0.9", "prune.protect=[0,1,2,3]"], ["0.9", "cannot be reached"]),
    (["prune.protect=[0,1,2,3,4,5]"], ["cannot be reached"]),
    (["prune.ratio=0.01", "prune.align=96"], ["prune.ratio = 0.01 removes nothing", "prune.align = 96"]),
    (["prune.align=97"], ["prune.align = 97", "the 96 channels", "lower it"]),
    (["prune.kinds=mlp", "prune.ratio=0.8"], ["cannot be reached", "heads"]),
    (["prune.search=uniform", "prune.align=96", "prune.ratio=0.6"], ["cannot be reached"]),
    (["recover.targets=['query']"], ["query", "recover.targets", "q_proj"]),
    (["recover.precision=float16"], ["float16", "GPU"]),
    (
        ["recover.prose=0.5", "recover.prose_from=gone.jsonl"],
        ["recover.prose_from = 'gone.jsonl'", "does not exist in"],
    ),
    (["recover.prose=0.5", "recover.prose_from=saap"], ["saap has no bookcorpus_like/passages.parquet"]),
    (["recover.prose=0.5", "recover.prose_from=README.md"], ["README.md", "is none of .parquet"]),
    (["data=README.md"], ["README.md"]),
    ([f"data={mini_folder() / 'alpaca/train.jsonl'}"], ["train.jsonl' is a file", "folder"]),
    (["recover.own=0.5", "recover.max_length=257"], ["recover.max_length = 257", "256 positions", "lower it"]),
    (["calibrate.length=257"], ["calibrate.length", "256 positions"]),
    (["evaluate.windows=[512]"], ["evaluate.windows", "256 positions"]),
    (["evaluate.windows=[256]", "evaluate.bos=always"], ["evaluate.windows", "256 positions"]),
    (["evaluate.windows=[]"], ["evaluate.windows is empty"]),
    (["speed.prompt_tokens=253"], ["speed.prompt_tokens = 253", "speed.new_tokens = 4", "256 positions", "lower"]),
    (["evaluate.max_tokens=16"], ["evaluate.max_tokens", "window of 32"]),
    (["compute.launch=rm -rf /"], ["compute.launch", "--multi_gpu"]),
    (["compute.launch=--help"], ["compute.launch", "--multi_gpu"]),
    (["compute.launch=train.py"], ["compute.launch", "--multi_gpu"]),
    (
        ["compute.launch=--num_processes 2", "recover.batch_size=4", "recover.micro_batch_size=4"],
        ["recover.batch_size = 4", "2 processes", "lower recover.micro_batch_size"],
    ),
    (["compute.launch=--num_processes two"], ["compute.launch", "invalid int value: 'two'"]),
    (["store=~/runs"], ["store", "'~'"]),
    (["compute.device=cuda:99"], ["cuda:99", "not there"]),
    (["model.path=/no/such/model"], ["/no/such/model", "does not exist"]),
    (["model.path=~/model"], ["~/model", "does not exist"]),
    (["model.path=./gone"], ["./gone", "does not exist"]),
    (["model.path=a/b/c"], ["a/b/c", "does not exist"]),
    (["model.path=smollm"], ["smollm", "smollm2-135m"]),
    (["model.path=org/model"], ["org/model"]),
]
SWEEPS = [
    ("", [], ["[sweep]"]),
    ("[sweep]", [], ["[sweep]"]),
    ("sweep = 3", [], ["[sweep]"]),
    ("[sweep]\n'prune.ratio' = 0.5", [], ["[sweep]", "lists"]),
    ("[sweep]\n'prune.ratio' = []", [], ["[sweep]", "lists"]),
    ("[sweep]\nprune.ratio = [0.2]", [], ["[sweep]", "lists"]),
    ("[sweep]\n'prune.ratio' = [0.2, 1.5]", [], ["prune.ratio", "1.5"]),
    ("[sweep]\n'prune.ratio' = [0.2, 0.2]", [], ["prune.ratio", "0.2 twice"]),
    ("[sweep]\n'prune.rato' = [0.2]", [], ["prune.rato"]),
    ("[sweep]\n'prune' = [0.2]", [], ["prune is a section"]),
    ("[sweep]\n'prune.ratio' = [0.2, 0.3]", ["prune.ratio=0.4"], ["prune.ratio", "axis"]),
    ("[sweep]\n'prune.ratio' = [0.2, 0.3]", ["prune={ratio=0.4}"], ["prune.ratio", "axis"]),
    ("[sweep]\n'prune.ratio' = [0.2, 0.3]", ["prune.align=0"], ["prune.align"]),
    (f"[sweep]\n'calibrate.seed' = {list(range(20000))}", [], ["10,000"]),
    ("[sweep]\n'prune.ratio' = [0.2, 0.99]", [], ["prune.ratio=0.99", "cannot be reached"]),
    ("[sweep]\n'model.path' = ['/gone', '/away']", [], ['model.path="/gone"', "does not exist"]),
]


@pytest.mark.parametrize(("overrides", "words"), RUNS, ids=str)
def test_a_run_that_the_model_cannot_make_is_refused(config, overrides, words):
    assert_refused(words, "plan", config, *settings(overrides))


@pytest.mark.parametrize("overrides", [["speed.prompt_tokens=252"], ["speed.prompt_tokens=600", "speed.runs=0"]])
def test_speed_may_take_all_positions_and_its_lengths_are_free_where_none_is_measured(config, overrides):
    done = RUNNER.invoke(app, ["plan", str(config), *settings(overrides)])
    assert done.exit_code == 0, done.exception


@pytest.mark.parametrize("override", ["prune.protect=[30]", "prune.protect=[-31]", "prune.ratio=0.97"])
def test_the_embedded_model_is_checked_too(config, override):
    line = refused("plan", config, *settings(["model.path=smollm2-135m", override]))
    assert "30 layers" in line or "cannot be reached" in line


@pytest.mark.slow
def test_what_is_said_of_the_embedded_model_is_what_its_file_says(tmp_path):
    file = GGUFReader(model_source("smollm2-135m", None, Fingerprints(tmp_path)).path)
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
    }
    said = {name: file.get_field(f"llama.{theirs}").contents() for name, theirs in names.items()}
    said["vocab_size"] = len(file.get_field("tokenizer.ggml.tokens").data)
    said["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in file.tensors)
    assert said | {"model_type": "llama"} == EMBEDDED["smollm2-135m"].config


@pytest.mark.parametrize(("name", "parameters"), [("smollm2-135m", 134_515_008), ("gemma3-270m", 268_098_176)])
def test_the_embedded_models_have_the_size_that_is_published(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**EMBEDDED[name].config))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("table", "overrides", "words"), SWEEPS, ids=lambda part: str(part)[:50])
def test_a_sweep_that_cannot_be_is_refused(config, table, overrides, words):
    config.write_text(table if "sweep = " in table else config.read_text() + table)
    assert_refused(words, "sweep", config, *settings(overrides))


@pytest.mark.parametrize(
    "override",
    [
        "prune.ratio=0.99",
        "recover.targets=['query']",
        "calibrate.length=257",
        "evaluate.max_tokens=16",
        "recover.bits=9",
    ],
)
def test_plan_run_sweep_and_the_deployed_flows_refuse_alike(config, store, override):
    line = refused("plan", config, "--set", override)
    assert refused("run", config, "--set", override) == line
    with pytest.raises((ConfigError, SaapError)) as flow:
        saap_run.fn(str(config), [override])
    assert str(flow.value) == line
    config.write_text(config.read_text() + "\n[sweep]\n'calibrate.seed' = [0, 1]")
    swept = refused("sweep", config, "--set", override)
    assert swept.endswith(line)
    with pytest.raises(ConfigError) as flow:
        saap_sweep.fn(str(config), [override])
    assert str(flow.value) == swept
    assert not list(store.glob("*/*/manifest.json"))
