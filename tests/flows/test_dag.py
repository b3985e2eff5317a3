"""Keys: what changes them, and what must not."""

import json
import shutil
from pathlib import Path

import pytest

from flows.combinations import base_of, combinations
from flows.dag import build
from flows.preview import preview_rows
from tasks.config import ConfigError, RunConfig, check_config, load_config
from tasks.criteria import NEEDS
from tasks.data import mini_folder
from tasks.stages.prune import prune
from tasks.stages.speed import machine_name
from tasks.toml import default_toml


@pytest.fixture
def settings(config):
    return lambda *overrides: load_config(config, overrides)


def keys(settings, *overrides):
    return {step.label: step.key for step in build(settings(*overrides))}


def changed(settings, *overrides):
    before, after = keys(settings), keys(settings, *overrides)
    return {label for label in before.keys() | after.keys() if before.get(label) != after.get(label)}


PRUNED = {f"evaluate {v} {b}" for v in ("pruned", "recovered") for b in ("arc_easy", "wikitext2")}
RECOVERED = {label for label in PRUNED if "recovered" in label}
DENSE = {"evaluate dense arc_easy", "evaluate dense wikitext2"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name='other'", set()),
        ("compute.batch_size=2", set()),
        ("store='elsewhere'", set()),
        ("recover.micro_batch_size=2", set()),
        ("recover.gradient_checkpointing=true", set()),
        ("calibrate.seed=1", {"calibrate", "score", "fuse", "fluctuation", "prune", "recover", "speed"} | PRUNED),
        ("calibrate.own=4", {"own_text", "score", "fuse", "fluctuation", "prune", "recover", "speed"} | PRUNED),
        ("score.hessian='fisher'", {"score", "fuse", "fluctuation", "prune", "recover", "speed"} | PRUNED),
        ("fuse.fusion='vector'", {"fuse", "fluctuation", "prune", "recover", "speed"} | PRUNED),
        ("fluctuation.asi_scope='kind'", {"fluctuation", "prune", "recover", "speed"} | PRUNED),
        ("prune.heads='query'", {"score", "fluctuation", "fuse", "prune", "recover", "speed"} | PRUNED),
        ("prune.ratio=0.3", {"prune", "recover", "speed"} | PRUNED),
        ("recover.seed=1", {"recover", "speed"} | RECOVERED),
        ("recover.own=0.5", {"recovery_text", "recover", "speed"} | RECOVERED),
        ("recover.prose=0.5", {"recovery_text", "recover", "speed"} | RECOVERED),
        ("evaluate.limit=5", {label for label in PRUNED | DENSE if "arc" in label}),
        ("evaluate.samples=true", {label for label in PRUNED | DENSE if "arc" in label}),
        ("evaluate.windows=[64]", {label for label in PRUNED | DENSE if "wiki" in label}),
        ("evaluate.variants=['pruned', 'recovered']", DENSE),
        ("evaluate.benchmarks=['arc_easy']", {label for label in PRUNED | DENSE if "wiki" in label}),
        ("speed.runs=3", {"speed"}),
        ("recover.distill=0", {"recover", "speed"} | RECOVERED),
        ("recover.recipe='none'", {"recover", "speed"} | RECOVERED),
        ("speed.runs=0", {"speed"}),
        ("criterion.variant='vectorize'", set()),
        ("calibrate.own=0", set()),
        ("prune.search='uniform_down'", set()),
        ("prune.search='global'", {"prune", "recover", "speed"} | PRUNED),
        ("prune.compensation='bias'", {"activations", "prune", "recover", "speed"} | PRUNED),
        ("criterion.name='random'", {"score", "fuse", "fluctuation", "rank", "prune", "recover", "speed"} | PRUNED),
    ],
)
def test_a_setting_changes_the_keys_of_its_stage_and_of_those_after_it_only(settings, override, expected):
    assert changed(settings, override) == expected


@pytest.mark.parametrize(
    "unread", [("recover.recipe=lora", "recover.bits=3"), ("recover.minutes=1", "recover.epochs=2")], ids=str
)
def test_what_a_recovery_does_not_read_is_in_no_key(settings, unread):
    this, other = unread
    assert keys(settings, this) == keys(settings, this, other)
    assert keys(settings) != keys(settings, other)


def test_a_speed_on_other_cores_or_another_gpu_is_another(settings, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    every, seven = machine_name("cpu", None), machine_name("cpu", 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "123")
    assert machine_name("cpu", None) != every
    assert machine_name("cpu", 7) == seven
    before = keys(settings)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "123,7")
    assert {label for label, key in keys(settings).items() if key != before[label]} == {"speed"}


def test_other_prose_makes_other_text_to_recover_on_and_no_other_calibration(settings, tmp_path):
    prose = tmp_path / "prose.jsonl"
    prose.write_text((mini_folder() / "bookcorpus_like/passages.jsonl").read_text())
    kinds = "recover.prose=0.25", "recover.own=0.25"
    before = keys(settings, *kinds)
    assert keys(settings, *kinds, f"recover.prose_from={prose}") == before  # the same passages
    prose.write_text('{"text": "Another passage, of other words."}\n')
    after = keys(settings, *kinds, f"recover.prose_from={prose}")
    other = {label for label in before if before[label] != after[label]}
    assert other == {"recovery_text", "recover", "speed"} | RECOVERED


def test_text_to_recover_on_is_made_before_what_is_long_because_there_may_be_too_little(settings):
    steps = build(settings("recover.prose=0.25", "recover.own=0.25", "criterion.name=saap_plus"))
    order = [step.stage for step in steps if not step.stage.startswith("evaluate")]
    assert order == ["calibrate", "recovery_text", "own_text", "fisher", "rank", "prune", "recover", "speed"]


def test_the_number_of_examples_is_that_of_the_instruction_rows_by_default(config, tmp_path):
    config.write_text(config.read_text().replace("examples = 8, prose = 0, own = 0, ", ""))
    text = next(step for step in build(load_config(config)) if step.stage == "recovery_text")
    assert {"prose": 0.3, "own": 0.3}.items() <= text.config().items()
    assert {name for name, _ in text.outside} == {"tokenizer", "model", "data", "instructions"}


def test_other_weights_change_every_key_and_another_folder_of_the_same_changes_none(settings, tiny_folder, tmp_path):
    same = shutil.copytree(tiny_folder, tmp_path / "same")
    assert changed(settings, f"model.path={same}") == set()
    weights = same / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert changed(settings, f"model.path={same}") == set(keys(settings)) - {"calibrate"}


def test_the_files_of_a_model_are_remembered_whatever_its_path_is_called(settings, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_folder)
    step = next(step for step in build(settings("model.path=model")) if step.stage == "score")
    looked_at = {Path(file).name for file in json.loads(step.looked_at)["files"]}
    assert {"model.safetensors", "config.json"} <= looked_at


def test_another_tokenizer_changes_all_that_reads_text_or_carries_it_and_a_template_what_carries_it(
    settings, tiny_folder, tmp_path
):
    folder = shutil.copytree(tiny_folder, tmp_path / "same")
    generation = json.loads((folder / "generation_config.json").read_text())
    carried = {"prune", "recover", "speed"} | PRUNED
    for name, content in (("chat_template.jinja", "x"), ("generation_config.json", json.dumps(generation | {"a": 1}))):
        (folder / name).write_text(content)
        assert changed(settings, f"model.path={folder}") == carried
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert changed(settings, f"model.path={folder}") == set(keys(settings))


def test_other_data_changes_the_stages_that_read_it(settings, tmp_path):
    data = shutil.copytree(mini_folder(), tmp_path / "data")
    assert changed(settings, f"data={data}") == set()
    with (data / "arc_easy" / "test.jsonl").open("a") as file:
        file.write("\n")
    assert changed(settings, f"data={data}") == {label for label in PRUNED | DENSE if "arc" in label}


def test_a_benchmark_without_data_is_skipped_with_the_remedy_and_evaluated_once_the_data_is_there(settings, tmp_path):
    data = shutil.copytree(mini_folder(), tmp_path / "data")
    whole = keys(settings, f"data={data}")
    (data / "arc_easy" / "test.jsonl").rename(tmp_path / "arc.jsonl")
    steps = {step.label: step for step in build(settings(f"data={data}"))}
    gone = {label for label, step in steps.items() if step.missing}
    assert gone == {f"evaluate {variant} arc_easy" for variant in ("dense", "pruned", "recovered")}
    assert f"{data} has no arc_easy/test.parquet" in steps["evaluate dense arc_easy"].missing
    assert {row[0] for row in preview_rows(list(steps.values())) if row[1] == "skip"} == gone
    assert {label for label, step in steps.items() if step.key != whole[label]} == gone
    (tmp_path / "arc.jsonl").rename(data / "arc_easy" / "test.jsonl")
    assert keys(settings, f"data={data}") == whole


@pytest.mark.parametrize("role", ["bookcorpus_like/passages", "alpaca/train"])
def test_missing_calibration_or_recovery_data_is_an_error(settings, tmp_path, role):
    data = shutil.copytree(mini_folder(), tmp_path / "data")
    (data / f"{role}.jsonl").unlink()
    with pytest.raises(ConfigError, match=role):
        build(settings(f"data={data}"))


def test_a_new_code_version_of_a_stage_makes_it_and_what_follows_anew(settings, monkeypatch):
    before = keys(settings)
    monkeypatch.setattr(prune, "version", prune.version + 1)
    after = keys(settings)
    assert {label for label in before if before[label] != after[label]} == {"prune", "recover", "speed"} | PRUNED


RANK_AS_THEY_PRUNE = ("saap_plus", "saap_gates", "wanda_sp", "gisp")


def steps_of(settings, *overrides):
    return {(step.stage, step.key) for step in build(settings(*overrides))}


def test_all_criteria_at_all_ratios_share_one_step_a_kind_of_statistics(settings):
    runs = [
        steps_of(settings, f"criterion.name='{name}'", f"prune.ratio={ratio}")
        for name in ("saap", *NEEDS)
        for ratio in (0.2, 0.35, 0.5)
    ]
    stages = [stage for stage, _ in set().union(*runs)]
    for statistic in {"calibrate", "score", "gradients", "activations"}:
        assert stages.count(statistic) == 1
    # those that prune as they rank have an order of their own for each ratio
    assert stages.count("rank") == len(NEEDS) + 2 * len(RANK_AS_THEY_PRUNE)
    assert stages.count("prune") == len(runs)


@pytest.mark.parametrize("name", NEEDS)
def test_a_criterion_is_ranked_anew_when_its_own_options_change_and_prunes_as_published(settings, name):
    def rank(*overrides):
        made = build(settings(f"criterion.name='{name}'", "calibrate.count=6", *overrides))
        return next(step for step in made if step.stage == "rank")

    assert (rank().key != rank("criterion.variant='vectorize'").key) == (name == "llm_pruner")
    assert (rank().key != rank("criterion.query_heads='served'").key) == (name == "llm_pruner")
    assert (rank().key != rank("calibrate.seed=1").key) == (name != "magnitude")
    assert (rank().key != rank("prune.ratio=0.4").key) == (name in RANK_AS_THEY_PRUNE)
    assert (rank().key != rank("prune.protect=[0]").key) == (name in RANK_AS_THEY_PRUNE)
    pooled = "criterion.take_heads='pooled'"
    assert (rank().key != rank(pooled).key) == (name == "saap_plus")
    assert (rank().key != rank("prune.ridge=1.0").key) == (name == "saap_plus")
    if name == "saap_plus":
        once = "criterion.cuts=[]"
        assert rank(once, pooled).key == rank(once, pooled, "prune.ratio=0.4").key
        assert rank("criterion.cuts=[0.1]").config()["cuts"] == [0.1, 0.2]
    assert (rank().key != rank("score.hessian='fisher'").key) == ("score" in NEEDS[name].statistics)
    cut = next(s for s in build(settings(f"criterion.name='{name}'")) if s.stage == "prune").config()
    assert (cut["search"], cut["compensation"]) == (NEEDS[name].search, NEEDS[name].compensation)


@pytest.mark.parametrize(("criterion", "written"), [("saap", []), ("saap_plus", [206]), ("wanda_sp", [])])
def test_saap_plus_has_the_model_write_text_unless_told_otherwise(settings, criterion, written):
    def counts(*overrides):
        made = build(settings(f"criterion.name='{criterion}'", *overrides))
        return [step.config()["count"] for step in made if step.stage == "own_text"]

    assert counts() == written
    assert (counts("calibrate.own=7"), counts("calibrate.own=0", "calibrate.count=6")) == ([7], [])


def test_what_a_group_of_attention_is_and_how_heads_are_chosen_are_told_apart(settings):
    """Both are called heads: a rank step loads the model by the one and asks the criterion with the other."""
    chosen = settings(
        "criterion.name='saap_plus'", "prune.heads='query'", "criterion.take_heads='measured'", "calibrate.count=6"
    )
    (rank,) = (step for step in build(chosen) if step.stage == "rank")
    params = json.loads(rank.params)
    assert (params["heads"], params["take_heads"]) == ("query", "measured")


def test_the_ridge_is_part_of_a_refit_only(settings):
    def cut(*overrides):
        return next(s for s in build(settings(*overrides)) if s.stage == "prune").key

    assert cut() == cut("prune.ridge=0.1")
    refitted = "prune.compensation='least_squares'"
    assert len({cut(refitted), cut(refitted, "prune.ridge=0.1"), cut(refitted, "prune.ridge=1.0")}) == 3


def test_each_compensation_takes_what_it_needs(settings):
    def extra(compensation):
        cut = next(s for s in build(settings(f"prune.compensation='{compensation}'")) if s.stage == "prune")
        return {name for name, *_ in cut.inputs} - {"model", "tokenizer", "groups"}

    assert extra("none") == extra("auto") == set()
    assert extra("bias") == {"activations"}
    assert extra("least_squares") == {"calibration"}


def test_every_step_comes_after_the_steps_it_takes(settings):
    made = set()
    for step in build(settings()):
        assert {(stage, key) for _, stage, key in step.inputs} <= made
        made.add((step.stage, step.key))


def test_a_sweep_is_the_product_of_its_axes(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[sweep]\n"prune.ratio" = [0.2, 0.5]\n"model.path" = ["a/b", "c/d"]\n')
    found = [load_config(file, tuple(overrides)) for overrides in combinations(str(file))]
    assert [(c.prune.ratio, c.model.path) for c in found] == [(0.2, "a/b"), (0.2, "c/d"), (0.5, "a/b"), (0.5, "c/d")]
    file.write_text('[sweep]\n"prune.ratio" = [0.2, 1.5]\n')
    with pytest.raises(ConfigError, match=r"^prune\.ratio=1\.5: "):
        combinations(str(file))
    file.write_text("[sweep]\nprune = [{ratio = 0.2}, {ratio = 0.5}]\n")
    with pytest.raises(ConfigError, match=r"^prune\.ratio: an axis"):
        combinations(str(file), ["prune.ratio=0.9"])
    file.write_text("")
    with pytest.raises(ConfigError, match="sweep"):
        combinations(str(file))


def test_a_sweep_may_need_its_axes_to_be_one(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('recover.batch_size = 4\n[sweep]\n"recover.micro_batch_size" = [2, 4]\n')
    with pytest.raises(ConfigError, match="multiple"):
        load_config(file)
    assert base_of(file).recover.batch_size == 4


def test_a_ratio_set_takes_the_place_of_a_files_target(tmp_path):
    file = tmp_path / "target.toml"
    file.write_text('prune.target = "80M"\n')
    for override in ("prune.ratio=0.3", "prune={ratio=0.3}"):
        assert load_config(file, (override,)).prune.target is None


def test_every_field_of_the_config_is_described():
    def walk(model):
        for field in model.model_fields.values():
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation)
            else:
                assert field.description

    walk(RunConfig)


def test_a_config_survives_json(settings):
    config = settings("prune.ratio=0.3")
    assert check_config(json.loads(config.model_dump_json())) == config


def test_the_printed_configuration_reads_back_as_the_defaults(tmp_path):
    (tmp_path / "all.toml").write_text(default_toml(RunConfig))
    assert load_config(tmp_path / "all.toml") == RunConfig()
    for words in ("[prune]", "[evaluate]", "[auto | global | uniform | uniform_down]", "lora | qlora | none]"):
        assert words in default_toml(RunConfig)
