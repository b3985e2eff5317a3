"""Models with experts through the whole pipeline, and what they cannot do refused by `saap plan`."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.commands import app
from saap import load, load_tokenizer
from tests.flows.bad_input import RUNNER, assert_refused, settings
from tests.flows.conftest import ask, saap
from tests.saap.models.families import GREEDY, IDS, logits
from tests.saap.models.mixtures import build

LORA = ["recover.recipe=lora", "recover.distill=0"]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A Qwen3-MoE as the hub has it, one tensor an expert and matrix; layer 1 is without experts."""
    return publish("qwen3_moe, layer 1 without experts", tiny_folder, tmp_path)


def publish(case, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "mixture")
    (folder / "model.safetensors").unlink()
    build(case).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["saap", "saap_plus", "reap"])
def test_a_run_prunes_recovers_and_measures_a_mixture(criterion, config, store, folder, prefect_server, tmp_path):
    more = [f"model.path={folder}", f"criterion.name={criterion}", "criterion.cuts=[0.1]", "prune.align=4"]
    done = saap("run", config, *settings([*more, *LORA]))
    assert done.returncode == 0, done.stderr
    head = next(line for line in done.stdout.splitlines() if "params" in line)
    assert head.split()[-5:] == ["params", "active", "weights", "tok/s", "speed"]
    assert max(len(line.rstrip()) for line in done.stdout.splitlines() if "/" not in line) <= 100
    sizes = ask(store, "select variant, parameters, active_parameters from speed")
    assert [row["variant"] for row in sizes] == ["dense", "pruned", "recovered"]
    dense, pruned, recovered = ((int(row["parameters"]), int(row["active_parameters"])) for row in sizes)
    assert pruned == recovered
    assert all(active < parameters for parameters, active in (dense, pruned))
    assert pruned[0] < dense[0]
    shown = saap("show", "--store", store).stdout
    assert f"{pruned[0]:,}, active {pruned[1]:,}" in shown
    kinds = ask(store, "select kind, sum(units) as units, sum(kept) as kept from widths group by kind order by kind")
    assert [(row["kind"], int(row["units"])) for row in kinds] == [
        ("attention", 8), ("expert", 12), ("mlp", 3 * 48 + 96)
    ]  # fmt: skip
    assert int(kinds[1]["kept"]) < 12
    page = next(store.glob("runs/*/report.html")).read_text()
    assert "active parameters" in page
    assert "Experts" in page
    checkpoint = next(store.glob("recover/*/config.json")).parent
    assert "experts" in (checkpoint / "README.md").read_text()
    assert load(checkpoint).config.model_type == "saap_qwen3_moe"
    measured = ask(store, "select variant, value from metrics where benchmark = 'wikitext2' order by variant")
    assert [row["variant"] for row in measured] == ["dense", "pruned", "recovered"]
    assert all(1 < float(row["value"]) < 1e6 for row in measured)


@pytest.mark.slow
def test_an_even_plan_becomes_a_stock_class(config, store, folder, prefect_server, tmp_path):
    even = ["prune.search=uniform", "prune.protect=[]", "prune.align=2", "criterion.name=magnitude"]
    small = ["recover.recipe=none", "evaluate.variants=[]", "speed.runs=0"]
    done = saap("run", config, *settings([f"model.path={folder}", *even, *small]))
    assert done.returncode == 0, done.stderr
    (pruned,) = (file.parent for file in store.glob("prune/*/config.json"))
    done = saap("export", "uniform", pruned, tmp_path / "even")
    assert done.returncode == 0, done.stderr
    model, stock = load(pruned), AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert type(stock).__name__ == "Qwen3MoeForCausalLM"
    layers = [own for number, own in enumerate(model.config.per_layer_config) if number != 1]
    assert len({(own.num_key_value_heads, own.num_experts) for own in layers}) == 1
    assert stock.config.num_experts == layers[0].num_experts < 4
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(stock.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    assert load_tokenizer(tmp_path / "even")
    manifest = json.loads((pruned / "manifest.json").read_text())
    assert manifest["summary"]["active_parameters"] < manifest["summary"]["parameters"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["criterion.name=flap"], ["'flap'", "experts", "saap_plus", "magnitude"]),
        (["criterion.name=saap_gates"], ["'saap_gates'"]),
        (["criterion.name=reap", "recover.recipe=groupwise"], ["int4", "'lora'"]),
        (["criterion.name=reap", "prune.compensation=bias"], ["prune.compensation", "'least_squares'"]),
        (["criterion.name=reap", "prune.search=uniform"], ["reap", "prune.kinds", "'mlp'"]),
        (["criterion.name=random", "prune.kinds=equal"], ["prune.kinds", "'pooled'"]),
        (["criterion.name=random", "compute.offload=true"], ["compute.offload"]),
        (["criterion.name=random", "speed.llama_cpp=true"], ["llama.cpp", "qwen3_moe"]),
        (["criterion.name=random", "prune.ratio=0.95"], ["ratio"]),
        (["criterion.name=random", "recover.targets=['gate_up_proj']"], ["gate_up_proj", "q_proj"]),
    ],
    ids=str,
)
def test_what_mixtures_cannot_do_is_refused_by_the_plan(overrides, words, config, folder):
    assert_refused(words, "plan", config, *settings([f"model.path={folder}", *LORA, *overrides]))


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_plan_takes_what_they_can(case, config, tiny_folder, tmp_path):
    folder = publish(case, tiny_folder, tmp_path)
    for more in (
        ["criterion.name=saap_plus"],
        ["criterion.name=reap", "prune.search=uniform", "prune.kinds=mlp", "prune.compensation=least_squares"],
        ["criterion.name=gisp", "prune.heads=query"],
    ):
        few = ["prune.ratio=0.1", "prune.align=4"]
        asked = ["plan", str(config), *settings([f"model.path={folder}", *LORA, *few, *more])]
        done = RUNNER.invoke(app, asked)
        assert done.exit_code == 0, done.exception
