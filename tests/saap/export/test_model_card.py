import re

import pytest
import yaml

from saap import discover, prune, save, to_groupwise
from saap.export.model_card import Origin, model_card
from tests.saap.models import families, mixtures
from tests.saap.models.families import build, random_keep

METRIC = {
    "benchmark": "piqa",
    "metric": "acc",
    "value": 0.625,
    "stderr": 0.04,
    "n": 100,
    "protocol": "a|b",
    "data": "x",
}


def origin(**changes):
    fields = {"base_model": "org/base-1b", "licence": "apache-2.0", "key": "prune/ab12", "run_id": "r7"}
    stages = {"calibrate": {"count": 50, "seed": None}, "prune": {"ratio": 0.25, "protect": [0, -1]}}
    return Origin(**(fields | {"stages": stages, "data": {"calibration": "hub"}, "removed": 0.2513} | changes))


@pytest.fixture
def bloom(tmp_path):
    model = prune(build("bloom"), random_keep(build("bloom")))
    save(model, tmp_path)
    return model


def test_a_card_says_where_the_model_comes_from_and_what_is_left_of_it(bloom, tmp_path):
    card = model_card(tmp_path, origin(), metrics=[METRIC], speed=[{"tokens_per_s": 12.345678}], place="me/mine")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == (
        "org/base-1b",
        "apache-2.0",
        "transformers",
    )
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.625
    for text in (
        "# base-1b, 25% of its prunable parameters removed\n",
        "pipeline: whole attention heads and MLP channels, ranked",
        "| calibrate | count 50 |",
        "| prune | ratio 0.25, protect [0, -1] |",
        "| calibration | hub |",
        "| piqa | acc | 0.625 | 0.04 | 100 | a\\|b | x |",
        "| 12.346 |",
        "Dense: 4 heads, 256 channels a layer.",
        'from_pretrained("me/mine", trust_remote_code=True)',
        "That of the base model: apache-2.0.",
        "Artifact `prune/ab12` of run `r7`",
    ):
        assert text in card
    for layer, own in enumerate(bloom.config.per_layer_config):
        assert f"| {layer} | {len(own.kept_heads)} | {own.intermediate_size} |" in card
    assert "saap export" not in card  # both refuse a BLOOM


def test_a_card_without_a_hub_id_licence_or_metrics_claims_none(tmp_path):
    save(to_groupwise(build("llama"), None, groups=4), tmp_path)
    card = model_card(tmp_path, origin(base_model="my-folder", licence=None, stages={}, removed=None))
    front = yaml.safe_load(card.split("---")[1])
    assert not {"base_model", "license", "model-index"} & front.keys()
    assert "int4" in front["tags"]
    assert "# my-folder, pruned, recovered in int4\n" in card
    assert "not stated" in card
    assert "## Results" not in card


def test_a_card_names_another_criterion_and_recipe(bloom, tmp_path):
    stages = {"rank": {"criterion": "flap"}, "prune": {"ratio": 0.5}, "recover": {"recipe": "lora"}}
    card = model_card(tmp_path, origin(stages=stages, removed=0.476))
    assert "# base-1b, 48% of its prunable parameters removed, recovered by lora\n" in card
    assert "ranked by the criterion 'flap'" in card


@pytest.mark.parametrize(
    ("case", "left", "removed", "exports"),
    [
        ("llama", "attention", "MLP channels", ["gguf", "uniform"]),
        ("phi3", "mlp", "attention heads", ["uniform"]),
        ("baichuan-13b, 12 heads", "", "attention heads and MLP channels", []),
        ("qwen3_moe", "", "attention heads, experts and MLP channels", ["uniform"]),
    ],
)
def test_a_card_names_what_was_removed_and_the_exports_of_the_family(tmp_path, case, left, removed, exports):
    made = mixtures if case in mixtures.CASES else families
    model = made.build(case)
    small = prune(model, made.random_keep(model) | (discover(model).kind == left))
    save(small, tmp_path)
    card = model_card(tmp_path, origin())
    assert f"pipeline: whole {removed}, ranked" in card
    assert re.findall(r"saap export (\w+)", card) == exports
    for layer, own in enumerate(small.config.per_layer_config):
        assert f"| {layer} | {len(getattr(own, 'kept_heads', range(own.num_attention_heads)))} |" in card
