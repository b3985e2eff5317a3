"""`saap export` on a store that the real stages filled."""

import json
import os
import re
import shutil

import gguf
import pytest
import torch
from huggingface_hub import ModelCard
from prefect.logging import disable_run_logger
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import saap
from flows.commands import app
from flows.dag import build
from storage.runs import RunRecord
from storage.tables import read_table
from storage.warehouse import Warehouse
from tasks.config import ConfigError, load_config
from tasks.running import find_or_publish
from tasks.stage import stage_named
from tests.flows.conftest import saap as command
from tests.flows.test_cli import refused
from tests.storage.kill_points import without_rights_over_files


@pytest.fixture(scope="module")
def store(tiny_folder, tmp_path_factory):
    """A store with the run 'r1', which has every stage on the tiny model."""
    root = tmp_path_factory.mktemp("export") / "store"
    (root / "runs").mkdir(parents=True)
    settings = [
        f'model.path="{tiny_folder}"',
        f'store="{root}"',
        "calibrate={count=4, length=16}",
        "prune={ratio=0.2, align=8, protect=[0, -1]}",
        "recover={examples=8, epochs=1, batch_size=4, micro_batch_size=4, rank=4, group_size=32}",
        'evaluate={benchmarks=["wikitext2"], windows=[32], max_tokens=512}',
        "speed={prompt_tokens=8, new_tokens=4, runs=2, warmup=1, llama_cpp=true}",
        'compute={device="cpu", threads=1}',
    ]
    config = load_config(None, tuple(settings))
    record = RunRecord(root, "r1", name="tiny", model="tiny", data="mini", ratio=0.2, config=config.model_dump_json())
    with disable_run_logger():
        for position, step in enumerate(build(config, "r1")):
            find_or_publish(stage_named(step.stage), step)
            about = {"stage": step.stage, "key": step.key, "variant": step.variant, "benchmark": step.benchmark}
            record.stage(position, **about, cached=False, seconds=1.0)
    record.finish("completed")
    Warehouse(root).load("r1")
    return root


def export(*arguments):
    """The output of `saap export …` in this process."""
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if done.exception:
        raise done.exception
    return done.output


def folder_of(store, stage):
    (folder,) = (store / stage).glob("[!.]*")
    return folder


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_a_published_checkpoint_has_a_card_its_plan_and_its_code(store, stage):
    folder = folder_of(store, stage)
    assert {"README.md", "plan.parquet", "modeling.py", "config.json", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert ("int4" in card.data.tags) == (stage == "recover")
    assert f"{stage}/{folder.name}" in card.text
    assert "`r1`" in card.text
    assert re.search(r"\| calibrate \| .*count 4, .*length 16", card.text)
    assert re.search(r"\| prune \| .*ratio 0.2", card.text)
    widths = read_table(folder_of(store, "prune"), "widths")
    removed = 1 - widths["kept_parameters"].sum() / widths["parameters"].sum()
    assert f", {removed:.0%} of its prunable parameters removed" in card.text.partition("\n## ")[0]
    for role in ("recovery", "recovery, prose"):
        assert (f"| {role} | mini |" in card.text) == (stage == "recover")
    for layer, own in enumerate(saap.load(folder).config.per_layer_config):
        row = (layer, own.num_attention_heads, own.num_key_value_heads, own.intermediate_size)
        assert "| " + " | ".join(map(str, row)) + " |" in card.text
    assert str(store) not in card.content


def test_the_card_of_an_export_has_the_metrics_of_the_run(store, tmp_path):
    export("hf", "r1", tmp_path / "out", "--store", store)
    folder = folder_of(store, "recover")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {file.name for file in folder.iterdir()} - {"manifest.json", "training.parquet"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (result,) = card.data.eval_results
    with Warehouse(store).reading() as connection:
        ((value,),) = connection.execute("select value from metrics where variant = 'recovered'").fetchall()
    assert (result.dataset_type, result.metric_type) == ("wikitext2", "perplexity")
    assert result.metric_value == pytest.approx(value, abs=1e-6)
    assert "## Size and speed" in card.text
    model, again = saap.load(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())


def test_a_dry_run_shows_the_files_and_writes_nothing(store, tmp_path):
    shown = export("hf", "r1", "--variant", "pruned", "--store", store, "--push", "org/name", "--dry-run")
    for name in ("model.safetensors", "modeling.py", "plan.parquet", "README.md", 'from_pretrained("org/name"'):
        assert name in shown
    assert "manifest.json" not in shown
    assert "| recover" not in shown


def test_an_export_of_a_folder_outside_any_store_needs_its_card(store, tiny_folder, tmp_path):
    export("hf", folder_of(store, "prune"), tmp_path / "out")
    export("hf", tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(Exception, match=r"no README\.md"):
        export("hf", tiny_folder, tmp_path / "nothing")


def test_further_chat_templates_go_along_and_a_variant_of_a_folder_is_refused(store, tmp_path):
    folder = shutil.copytree(folder_of(store, "prune"), tmp_path / "pruned")
    (folder / "manifest.json").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("a card")
    export("hf", folder, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    for source in (folder, folder_of(store, "prune")):
        with pytest.raises(ConfigError, match="variant"):
            export("gguf", source, tmp_path / "int4.gguf", "--variant", "recovered")


def test_gguf_and_uniform_take_a_run_or_a_folder(store, tmp_path):
    assert "Q4_1" in export("gguf", "r1", tmp_path / "int4.gguf", "--store", store)
    assert gguf.GGUFReader(tmp_path / "int4.gguf").get_field("deci.block_count").contents() == 6
    pruned = folder_of(store, "prune")
    assert "F32" in export("gguf", pruned, tmp_path / "pruned.gguf", "--floats", "f32")
    widest = max(own.intermediate_size for own in saap.load(pruned).config.per_layer_config)
    said = export("uniform", "r1", tmp_path / "even", "--variant", "pruned", "--store", store, "--round-to", "4")
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert config["intermediate_size"] == -(-widest // 4) * 4
    assert f"intermediate_size {config['intermediate_size']}" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["even", "int4.gguf", "pruned.gguf"]


def test_what_is_exported_has_the_mode_of_new_files_whatever_the_checkpoint_has(store, tmp_path):
    folder = shutil.copytree(folder_of(store, "recover"), tmp_path / "recovered")
    (folder / "manifest.json").unlink()
    for file in folder.iterdir():
        file.chmod(0o400)
    (new := tmp_path / "new").touch()
    for name in ("hf", "uniform", "gguf"):
        export(name, folder, tmp_path / name)
    files = [tmp_path / "gguf", *(tmp_path / "hf").iterdir(), *(tmp_path / "uniform").iterdir()]
    assert {file.stat().st_mode for file in files} == {new.stat().st_mode}


@pytest.mark.parametrize("name", ["hf", "uniform", "gguf"])
def test_an_export_replaces_nothing_and_says_so_before_the_model_is_read(store, tmp_path, monkeypatch, name):
    for module in ("gguf.export_gguf", "uniform.export_uniform"):
        monkeypatch.setattr(f"saap.export.{module}", None)
    (there := tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigError, match=f"^{there} exists already: name another$"):
        export(name, "r1", there, "--store", store)
    assert there.read_text() == "mine"


@pytest.mark.parametrize("what", [["hf"], ["gguf"], ["uniform"]], ids=" ".join)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_damaged_checkpoint_does_not_leave_the_store(store, tmp_path, what, name):
    copy = shutil.copytree(store, tmp_path / "copy")
    file = folder_of(copy, "recover") / name
    file.write_bytes(bytes(file.stat().st_size))
    # what has no manifest is set aside by who asks first for the run
    for source in ("r1",) if name == "manifest.json" else ("r1", file.parent):
        with pytest.raises(Exception, match=r"recover/.* is (damaged: .*|gone); run again") as caught:
            export(*what, source, tmp_path / "out", "--store", copy)
        assert caught.value.exit_code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


READING = {
    "sql": ["sql", "from leaderboard"],
    "report": ["report"],
    "report of all": ["report", "tiny", "--html", "page.html"],
    "show": ["show", "r1"],
    "diff": ["diff", "r1", "r1"],
    "compare": ["compare", "sweep.toml"],
    "plan": ["plan", "sweep.toml"],
    "du": ["du"],
    "gc": ["gc"],
    "verify": ["verify"],
    "export hf": ["export", "hf", "r1", "out"],
    "export gguf": ["export", "gguf", "r1", "out.gguf"],
    "export uniform": ["export", "uniform", "r1", "out"],
    "export mlflow": ["export", "mlflow", "r1", "--uri", "sqlite:///mlflow.db"],
}


@pytest.mark.parametrize("state", ["up to date", "cut short"])
def test_a_store_to_read_only_serves_every_command_that_reads(store, tiny_folder, tmp_path, monkeypatch, state):
    root = shutil.copytree(store, tmp_path / "store")
    if state == "cut short":
        os.truncate(root / "warehouse.duckdb", 100_000)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "sweep.toml").write_text(f'model.path="{tiny_folder}"\n[sweep]\n"calibrate.seed" = [0, 1]\n')
    everything = (root, *root.rglob("*"))
    for file in everything:
        file.chmod(0o555 if file.is_dir() else 0o444)
    before = {file: file.stat().st_mtime_ns for file in everything}
    assert without_rights_over_files((root / "new").mkdir) == 1
    for name, arguments in READING.items():

        def look(name=name, arguments=arguments):
            done = CliRunner().invoke(app, [*arguments, "--store", str(root)])
            assert done.exit_code == 0, done.exception
            assert name != "report" or f"no page: cannot write {root}" in done.output.replace("\n", "")

        assert without_rights_over_files(look) == 0, name
        shutil.rmtree(place / "out", ignore_errors=True)
    assert {file: file.stat().st_mtime_ns for file in (root, *root.rglob("*"))} == before
    for file in everything:
        file.chmod(0o755 if file.is_dir() else 0o644)


def test_speeds_in_llama_cpp_stand_beside_those_in_torch(store):
    with Warehouse(store).reading() as connection:
        rows = connection.execute("select variant, dtype, parameters, weight_bytes from speed where tokens_per_s > 0")
        found = {variant: rest for variant, *rest in rows.fetchall()}
    for variant, dtype in (("dense", "F16"), ("pruned", "F16"), ("recovered", "Q4_1")):
        there, here = found[f"{variant} in llama.cpp"], found[variant]
        assert there[:2] == [dtype, here[1]]
        assert there[2] < here[2]
    card = export("hf", "r1", "--store", store, "--dry-run")
    assert "| recovered in llama.cpp |" in card
    assert "| pruned" not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gguf", "no-such-run", "x.gguf"], "neither a folder nor a run"),
        (["gguf", "r1", "no/where/x.gguf"], "no folder"),
        (["uniform", "r1", "."], "exists already"),
        (["uniform", "r1", "no/where"], "no folder"),
        (["hf", "r1"], "say where to"),
        (["hf", "r1", "--push", "name"], "org/name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_export_is_refused_and_leaves_nothing(store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message) as caught:
        export(*arguments, "--store", store)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_push_without_a_token_or_a_hub_ends_in_one_line(store, tmp_path, monkeypatch):
    arguments = ["hf", "r1", "--push", "org/name", "--store", store]
    done = command("export", *arguments, environment={"HF_HOME": str(tmp_path), "HF_TOKEN": ""})
    refused(done, "HF_TOKEN", "--dry-run")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(Exception, match=r"cannot upload to org/name: [^\n]*$"):  # tests run without a hub
        export(*arguments)
