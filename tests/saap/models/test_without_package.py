"""Checkpoints in a virtual environment that has transformers and lm-eval, and not this package."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from safetensors.torch import save_file

from saap import accuracy, dequantize, load, load_tokenizer, prune, save, to_groupwise
from saap.models import modeling
from tasks.data import mini_folder
from tests.saap.models.families import CASES, GREEDY, IDS, LLAMA_LIKE, OTHERS, build, logits, random_keep
from tests.saap.models.mixtures import CASES as MIXTURES
from tests.saap.models.mixtures import build as mixture
from tests.saap.models.mixtures import random_keep as some_kept

PROGRAM = """
import json, sys, torch
from importlib.util import find_spec
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
assert find_spec("saap") is None, "the package can be imported here"
assert find_spec("torch") is not None
expected = load_file("expected.safetensors")
ids, greedy = torch.tensor(json.loads(sys.argv[1])), json.loads(sys.argv[2])
for name in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__, type(model)
    torch.testing.assert_close(model(ids).logits, expected[name + " logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids, **greedy), expected[name + " tokens"]), name
    base = AutoModel.from_pretrained(name, trust_remote_code=True)
    assert type(base).__name__ == type(model).__name__.replace("ForCausalLM", "Model"), type(base)
    assert torch.equal(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state), name
    model.save_pretrained(name + " again")
    again = AutoModelForCausalLM.from_pretrained(name + " again", trust_remote_code=True).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items()), name
"""

# the entry point of the lm_eval command, twice in one process: importing it takes the longest
LM_EVAL = """
import sys
from importlib.util import find_spec
from lm_eval.__main__ import cli_evaluate
assert find_spec("saap") is None
for name in sys.argv[1:]:
    options = f"--model hf --model_args pretrained={name},trust_remote_code=True,max_length=256 --device cpu"
    options += f" --tasks arc_easy_here --include_path tasks --batch_size 16 --output_path {name}.json"
    sys.argv = ["lm_eval", *options.split()]
    cli_evaluate()
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A function that runs Python in a virtual environment with the packages of this one, but not saap."""
    home = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    # a folder that a .pth file adds has its own .pth files left alone: an editable install of saap stays unseen
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = next((home / "venv").glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text("\n".join(sorted(packages)))

    def run(*arguments, cwd):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HOME": str(home)}
        program = [home / "venv" / "bin" / "python", "-I", *map(str, arguments)]
        done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_pruned_and_int4_models_of_every_family_load_and_generate_the_same(elsewhere, tmp_path):
    models = {case: prune(build(case), random_keep(build(case))) for case in CASES}
    models |= {f"{case}, int4": to_groupwise(models[case], 32) for case in {*LLAMA_LIKE} - {*OTHERS} | {"phi3"}}
    models |= {case: prune(mixture(case), some_kept(mixture(case))) for case in MIXTURES}
    expected = {}
    for name, model in models.items():
        save(model, tmp_path / name)
        expected[f"{name} logits"] = logits(model)
        expected[f"{name} tokens"] = model.generate(IDS, **GREEDY)
    save_file(expected, tmp_path / "expected.safetensors")
    elsewhere("-c", PROGRAM, json.dumps(IDS.tolist()), json.dumps(GREEDY), *models, cwd=tmp_path)


def test_with_the_package_the_file_in_the_checkpoint_is_not_run(tmp_path):
    small = prune(build("llama"), random_keep(build("llama")))
    save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling.SaapLlamaConfig",
        "AutoModel": "modeling.SaapLlamaModel",
        "AutoModelForCausalLM": "modeling.SaapLlamaForCausalLM",
    }
    assert (tmp_path / "modeling.py").read_text() == Path(modeling.__file__).read_text()
    (tmp_path / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')")
    torch.testing.assert_close(logits(load(tmp_path)), logits(small))


@pytest.mark.slow
def test_lm_evals_command_line_gives_the_accuracies_that_ours_does(elsewhere, tiny_folder, tmp_path):
    data = mini_folder() / "arc_easy" / "test.jsonl"
    files = {name: str(data) for name in ("train", "validation", "test")}
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"),
        "task": "arc_easy_here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(json.dumps(task))
    tokenizer = load_tokenizer(tiny_folder)
    llama, bloom = (prune(build(case), random_keep(build(case))) for case in ("llama", "bloom"))
    models = {"int4": to_groupwise(llama, 32), "bloom": bloom}
    for name, model in models.items():
        save(model, tmp_path / name, tokenizer)
    elsewhere("-c", LM_EVAL, *models, cwd=tmp_path)
    for name, model in models.items():
        (result,) = tmp_path.glob(f"{name}_*.json")
        theirs = json.loads(result.read_text())["results"]["arc_easy_here"]
        ours, _ = accuracy(dequantize(model), tokenizer, "arc_easy", data_file=data)
        for metric in ours:
            found = theirs[f"{metric.metric},none"], theirs[f"{metric.metric}_stderr,none"]
            assert found == pytest.approx((metric.value, metric.stderr), abs=1e-9), (name, metric.metric)
