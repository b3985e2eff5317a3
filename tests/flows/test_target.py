"""`prune.target` run for real on a tiny model: what comes out is what was asked for."""

import json

import pytest

from flows.compare import compare, headlines, table
from flows.dag import build
from flows.job import prepare
from flows.targets import sweep_of_file
from flows.to_ratio import with_ratio
from saap import load, size_of
from storage.artifacts import ArtifactStore
from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tasks.config import load_config
from tasks.outside import Outside
from tests.flows.bad_input import assert_refused, refused, settings
from tests.flows.conftest import saap

STEP = 8 * 3 * 64  # parameters of a step of channels of the tiny model
QUICK = ("evaluate.variants=[]", "recover.recipe='none'", "speed.runs=0")


@pytest.fixture
def config(config):
    """Without a ratio."""
    config.write_text(config.read_text().replace("ratio = 0.2, ", ""))
    return config


def made(store, stage):
    """{manifest: size} of the checkpoints of a stage."""
    artifacts = ArtifactStore(store)
    keys = [key for found, key in artifacts.all() if found == stage]
    return [(artifacts.inspect(stage, key)[0], size_of(load(artifacts.path(stage, key)))) for key in keys]


def run(config, *overrides):
    from flows.run import saap_run

    run_id = saap_run(str(config), list(overrides))
    return read_run(config.parent / "store", run_id)


POOLED = "criterion.take_heads=pooled"
REFUSED = [
    (["prune.target=80"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target='80 M'"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target=120mb"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target=-1M"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target=0M"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target=fast"], ["prune.target", "'80M'", "'120MB'", "'1.5x'"]),
    (["prune.target=0.9x"], ["prune.target", "above '1x'"]),
    (["prune.target=200K", "prune.ratio=0.2"], ["prune.ratio or prune.target", "not both"]),
    (["prune.target=1.5x", "speed.runs=0"], ["1.5x", "speed.runs"]),
    (["prune.target=1.5x", "execute.runner=ray"], ["1.5x", "execute.runner"]),
    (["prune.target=100K"], ["prune.target = '100K'", "out of reach", "from 158.6K", "250.6K"]),
    (["prune.target=300K"], ["prune.target = '300K'", "out of reach", "from 158.6K", "250.6K"]),
    (["prune.target=200K", "prune.protect=[0,1,2,3,4,5]"], ["out of reach", "250.6K"]),
    (["prune.target=100KB"], ["prune.target = '100KB'", "out of reach", "KB"]),
    (["prune.target=5MB", "recover.recipe=none"], ["prune.target = '5MB'", "out of reach", "KB"]),
    (["prune.target=200K", "compute.device=cuda:99"], ["cuda:99"]),
    (["prune.target=1.1x", "recover.examples=131"], ["the data has 130"]),  # and no layer is timed
    (
        ["prune.target=170K", "criterion.name=saap_plus", "prune.search=uniform", "criterion.cuts=[0.25]", POOLED],
        ["170K", "criterion.cuts"],
    ),
]


def test_a_target_that_is_set_takes_the_place_of_the_ratio_of_a_file_and_the_other_way_round(config):
    config.write_text(config.read_text().replace("prune = { ", "prune = { ratio = 0.3, "))
    assert load_config(config, ("prune.target=200K",)).prune.target == "200K"
    config.write_text(config.read_text().replace("ratio = 0.3", 'target = "200K"'))
    changed = load_config(config, ("prune.ratio=0.1",)).prune
    assert (changed.ratio, changed.target) == (0.1, None)


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=str)
def test_a_target_that_cannot_be_is_refused_before_anything_runs(config, store, overrides, words):
    assert_refused(words, "plan", config, *settings(overrides))
    assert_refused(words, "run", config, *settings(overrides))
    assert not list(store.glob("*/*/manifest.json"))


def test_what_the_refusal_names_can_be_had(config):
    line = refused("plan", config, *settings(["prune.target=100K"]))
    smallest = line.partition("from ")[2].partition(" ")[0]
    job = prepare(load_config(config, (f"prune.target={smallest}",)), look_only=True)
    assert 0 < job.settings.prune.ratio < 1


def test_both_in_the_file_are_refused_too(config):
    config.write_text(config.read_text().replace("prune = {", "prune = { ratio = 0.3, target = '200K',"))
    assert_refused(["prune.ratio or prune.target"], "run", config)


def test_a_plan_says_which_ratio_and_needs_a_run_first_for_a_speed(config):
    done = saap("plan", config, "--set", "prune.target=200K")
    assert done.returncode == 0, done.stderr
    assert "prune.target = '200K': a ratio of 0." in done.stdout
    assert_refused(["1.5x", "saap run"], "plan", config, "--set", "prune.target=1.5x")


def test_a_configuration_without_a_target_has_the_keys_it_had(config):
    plain = load_config(config, ("prune.ratio=0.3",))
    assert with_ratio(plain, Outside(plain)) is plain
    cut = next(step for step in build(plain) if step.stage == "prune")
    assert not {"target", "form"} & cut.config().keys()
    assert {"layer_times"}.isdisjoint(step.stage for step in build(plain))


@pytest.mark.parametrize(
    "criterion", ["magnitude", "saap_plus", "saap_gates", "llm_pruner", "wanda_sp", "gisp", "flap", "saap"]
)
@pytest.mark.slow
def test_every_criterion_meets_the_parameters(config, store, prefect_server, criterion):
    about = run(config, "prune.target='190K'", f"criterion.name={criterion!r}", *QUICK)
    ((manifest, size),) = made(store, "prune")
    assert abs(size.parameters - 190_000) <= STEP / 2
    assert manifest["params"]["target"] == "190K"
    assert about["ratio"] == manifest["params"]["ratio"]
    assert about["ratio"] == pytest.approx(manifest["summary"]["removed_of_prunable"], abs=0.02)
    assert json.loads(about["config"])["prune"]["target"] == "190K"
    for found, key in ArtifactStore(store).all():
        if found == "rank" and "ratio" in (params := ArtifactStore(store).inspect(found, key)[0]["params"]):
            assert params["ratio"] == about["ratio"]
    with Warehouse(store).reading() as connection:
        assert connection.execute("select ratio from runs").fetchall() == [(about["ratio"],)]


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["recover.recipe='none'"], "prune"),
        (["recover.recipe='none'", "model.dtype='bfloat16'"], "prune"),
        (["recover.recipe='lora'"], "recover"),
        ([], "recover"),
        (["recover.groups=3", "recover.bits=3", "model.dtype='bfloat16'"], "recover"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_bytes_are_those_of_the_checkpoint_that_the_run_ends_with(config, store, prefect_server, overrides, stage):
    dtype = "bfloat16" if any("bfloat16" in part for part in overrides) else "float32"
    groupwise = stage == "recover" and not any("lora" in part for part in overrides)
    width = 2 if dtype == "bfloat16" else 4
    target = (215 if width == 2 else 375) if groupwise else 200 * width
    run(config, f"prune.target='{target}KB'", *overrides, "evaluate.variants=[]", "speed.runs=0")
    artifacts = ArtifactStore(store)
    (key,) = [key for found, key in artifacts.all() if found == stage]
    found = size_of(load(artifacts.path(stage, key), dtype=dtype)).weight_bytes
    assert abs(found - 1000 * target) <= STEP / 2 * (1 if groupwise else width)


@pytest.mark.slow
def test_a_speed_is_planned_from_measured_times_and_checked_by_the_speed_stage(config, store, prefect_server):
    from saap import DecodeTime, discover
    from storage.tables import read_table
    from tasks.stages.layer_times import LayerTimes

    overrides = ["evaluate.variants=[]", "recover.recipe='none'", "model.path='wide'", "prune.align=64"]
    wide = config.parent / "wide"
    make_wide(wide, config)
    overrides[2] = f"model.path={str(wide)!r}"
    about = run(config, "prune.target='1.1x'", *overrides)
    assert about["status"] == "completed"
    artifacts = ArtifactStore(store)
    keys = dict(artifacts.all())
    groups = discover(load(wide))
    table = LayerTimes(artifacts.path("layer_times", keys["layer_times"])).read()
    assert {kind for kind, *_ in table} == {"attention", "mlp"}
    assert all(0 < share < 1 and time > 0 for _, share, time in table)
    plan = read_table(artifacts.path("prune", keys["prune"]), "plan")["kept"]
    time = DecodeTime(groups, table)
    assert time(plan) == pytest.approx(1 / 1.1, rel=0.05)  # a step without an effect, in noisy times, ends the search
    speed = artifacts.inspect("speed", keys["speed"])[0]
    assert speed["params"]["target"] == "1.1x"
    assert speed["summary"]["of_target"].endswith("x of 1.1x")
    # the table is there now: another target needs no timing, and a plan can be had
    job = prepare(load_config(config, ("prune.target=1.05x", *overrides)), look_only=True)
    assert keys["layer_times"] in {step.key for step in job.steps}
    assert 0 < job.settings.prune.ratio < about["ratio"]
    assert_refused(["9999x", "out of reach", "up to"], "plan", config, *settings(["prune.target=9999x", *overrides]))


@pytest.mark.slow
def test_gc_leaves_what_is_made_to_time_the_layers(config, store, monkeypatch):
    from flows.to_ratio import _layer_times
    from storage.gc import find_waste
    from tasks import running

    publish, seen = running.find_or_publish, []

    def and_look(stage, step):
        made = publish(stage, step)
        seen.append([one for one in find_waste(ArtifactStore(store)) if one.kind in ("artifact", "run record")])
        return made

    monkeypatch.setattr(running, "find_or_publish", and_look)
    settings = load_config(config, ("prune.target=1.1x",))
    assert _layer_times(settings, Outside(settings), "r9", look_only=False)
    assert seen == [[]]
    assert not list((store / "runs").iterdir())


@pytest.mark.parametrize(("found", "warned"), [(1.43, False), (1.57, False), (1.42, True), (1.58, True)])
def test_a_speed_that_is_missed_by_more_than_a_twentieth_warns(found, warned, caplog):
    from tasks.stages.speed import checked

    assert checked("1.5x", found) == f"{found:.2f}x of 1.5x"
    assert ("prune.target" in caplog.text) == warned


def make_wide(folder, config):
    """The tiny model's folder with a model whose MLPs are most of it, so that narrower ones are faster."""
    import shutil
    import tomllib

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tomllib.loads(config.read_text())["model"]["path"], folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


@pytest.mark.slow
def test_a_target_is_an_axis_of_a_sweep(config, store, prefect_server):
    from flows.sweep import saap_sweep

    quick = ['evaluate = { benchmarks = ["wikitext2"], windows = [128], max_tokens = 512 }', 'recover.recipe = "none"']
    lines = [line for line in config.read_text().splitlines() if not line.startswith(("evaluate", "recover", "speed"))]
    axes = ["[sweep]", '"prune.target" = ["210K", "180K"]', '"criterion.name" = ["magnitude", "flap"]']
    config.write_text("\n".join([*lines, *quick, "speed.runs = 0", *axes]))
    assert len(saap_sweep(str(config))) == 4
    found = compare(str(config))
    assert (found.axes, found.missing) == (["criterion.name"], 0)
    header, rows = table(found)
    assert header[:4] == ["criterion", "target", "ratio", "variant"]
    assert {tuple(row[:2]) for row in rows if row[3] == "pruned"} == {
        (name, target) for name in ("magnitude", "flap") for target in ("210K", "180K")
    }
    for row in found.rows:
        if row.variant == "pruned":
            wanted = {"210K": 210_000, "180K": 180_000}[row.target]
            assert abs(row.means["parameters"] - wanted) <= STEP / 2
    assert {line.partition(":")[0] for line in headlines(found)} == {"pruned at 210K", "pruned at 180K"}
    assert [row[1] for row in rows if row[3] == "dense"] == [""]
    with Warehouse(store).reading() as connection:
        assert sweep_of_file(connection, config, ()).missing == 0
    assert len(all_runs(store)) == 4
