"""sql, rebuild, gc, du, report and plan as typed: what they refuse, print, and leave alone."""

import json
import shutil
import subprocess
import time

import pytest

from storage.keys import digest
from tests.flows.conftest import Command, ask, saap
from tests.flows.test_cli import refused
from tests.storage.kill_points import PLAIN, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "store"
    run(root, "r1")
    return root


@pytest.fixture
def filled(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "filled")


def files(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def closed_queries(root, elsewhere):
    importance = root / "score" / PLAIN / "importance.parquet"
    record = root / "runs" / "r1" / "run.json"
    return {
        f"copy (select 1) to '{record}'": "read-only",
        f"copy (select 1 as x) to '{importance}' (format parquet)": "read-only",
        f"explain analyze copy (select 1 as x) to '{importance}'": "read-only",
        f"prepare p as copy (select 1) to '{elsewhere}/x'": "read-only",
        f"export database '{elsewhere}/all'": "read-only",
        f"attach '{elsewhere}/other.db'": "read-only",
        "install httpfs": "read-only",
        "load httpfs": "read-only",
        "set enable_external_access = true": "read-only",
        "drop table metrics": "read-only",
        "select 1; delete from metrics": "read-only",
        f"select * from read_text('{record}')": "Cannot access file",
        "select * from glob('/*')": "Cannot access file",
        f"from '{root}/prune/{PLAIN}/widths.parquet'": "Cannot access file",
        f"from read_csv('{elsewhere}/secret.csv')": "Cannot access file",
        "select 1; select 2": "one query at a time",
        "": "empty",
        " ; ": "empty",
        "select nonsense": "nonsense",
        "selec 1": "selec",
    }


def test_sql_reads_the_warehouse_and_nothing_else(filled, tmp_path):
    """In this process: what is printed, and that nothing changes. The command itself is tried below."""
    from storage.errors import StorageError
    from storage.query import ask as ask_here

    (tmp_path / "secret.csv").write_text("a\n1\n")
    assert ask_here(filled, "select count(*) as n, sum(vector) from importance") == (["n", "sum(vector)"], [(10, 10.0)])
    before = files(filled), sorted(p.name for p in tmp_path.iterdir())
    for query, word in closed_queries(filled, tmp_path).items():
        with pytest.raises(StorageError, match=word) as refusal:
            ask_here(filled, query)
        assert "\n" not in str(refusal.value)
        assert refusal.value.exit_code == 2
    assert (files(filled), sorted(p.name for p in tmp_path.iterdir())) == before
    for query in ("pivot stage_runs on stage using count(*)", "explain select 1", "show tables", "describe runs",
                  "summarize metrics", "from runs;"):  # fmt: skip
        assert ask_here(filled, query)[1]


def test_json_is_valid_and_keeps_columns_of_one_name(filled):
    query = "select 'nan'::double as a, 1 as a, -'inf'::float as a, [1.5, 'nan'::double] as b, {'x': 1::decimal} as c"
    done = saap("sql", query, "--store", filled, "--json")

    def no_constant(name):
        raise ValueError(name)

    (row,) = json.loads(done.stdout, parse_constant=no_constant)
    assert row == {"a": None, "a_2": 1, "a_3": None, "b": [1.5, None], "c": {"x": 1.0}}
    assert "NaN" in saap("sql", "--help").stdout
    refused(saap("sql", "copy (select 1) to 'x'", "--store", filled), "read-only")
    refused(saap("sql", "", "--store", filled), "empty")


def test_a_mistyped_store_is_not_made(tmp_path):
    for command in ("rebuild", "verify", "gc", "du", "report"):
        refused(saap(command, "--store", tmp_path / "none"), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_report_for_a_folder_that_is_not_there_is_refused(filled, tmp_path):
    refused(saap("report", "--store", filled, "--svg", tmp_path / "no" / "report.svg"), "no folder")


def test_gc_shows_first_and_removes_when_told(filled):
    unused, draft = f"prune/{digest('unused')}", f"prune/.draft-{digest('x')}-12345678"
    shutil.copytree(filled / "prune" / PLAIN, filled / unused)
    (filled / draft).mkdir()
    before = files(filled)
    done = saap("gc", "--store", filled)
    assert done.returncode == 0, done.stderr
    assert files(filled) == before
    for word in (draft, unused, "--delete"):
        assert word in done.stdout
    done = saap("gc", "--store", filled, "--delete")
    assert "removed" in done.stdout
    assert not (filled / draft).exists()
    assert not (filled / unused).exists()
    assert "r1" in saap("du", "--store", filled).stdout
    refused(saap("gc", "--store", filled, "--run", "r7"), "no such run")
    assert ask(filled, "select count(*) as n from stage_runs") == [{"n": "3"}]
    saap("gc", "--store", filled, "--run", "r1", "--delete")
    assert ask(filled, "select count(*) as n from stage_runs") == [{"n": "0"}]


def test_plan_writes_nothing_beside_a_store_and_downloads_nothing(config, store, tiny_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    big = shutil.copytree(tiny_folder, tmp_path / "big")
    file = next(big.glob("*.safetensors"))
    assert file.stat().st_size < 1 << 24
    saved = load_file(file)
    import numpy as np

    save_file({**saved, "unused": np.zeros(1 << 22, np.float32)}, file, metadata={"format": "pt"})
    run(store, "r1")
    before = files(store)
    done = saap("plan", config, "--set", f"model.path={big}")
    assert files(store) == before, done.stderr
    refused(saap("plan", config, "--set", "model.path=org/model"), "org/model", "not been downloaded")
    assert files(store) == before


def test_a_full_disk_is_one_line(config, tmp_path):
    """A file system of its own, full: needs the right to mount."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(OSError, match="No space"):
            (place / "filler").write_bytes(bytes(1 << 20))
        refused(saap("run", config, "--store", place / "store"), "No space left", "free some space")
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_store_removed_while_a_run_works_ends_it_in_one_line(config, store, prefect_server):
    process = Command(("run", config))
    deadline = time.monotonic() + 300
    while not list(store.glob("calibrate/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    store.rename(store.with_name("elsewhere"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors, errors
    assert len([line for line in errors.splitlines() if line.startswith("saap: ")]) == 1, errors
    assert not (store / "runs").exists()


def test_folders_of_others_beside_a_store_survive_its_commands(filled):
    names = ("models/Llama/model.safetensors", "runs/exp/run.json", "runs/tensorboard/events", "locks/poetry.lock")
    names += (f"photos/{PLAIN}/1.png", f"prune/{PLAIN[::-1]}/weights.bin")
    for name in names:
        (filled / name).parent.mkdir(parents=True, exist_ok=True)
        (filled / name).write_text("mine")
    (filled / "prune" / PLAIN / "manifest.json").unlink()
    verified = saap("verify", "--store", filled)
    assert verified.returncode == 1
    assert "2 of 3 artifacts are whole" in verified.stdout
    assert not (filled / "prune" / PLAIN).exists()
    for command in (("rebuild",), ("du",), ("gc", "--older", "0", "--delete")):
        done = saap(*command, "--store", filled)
        assert done.returncode == 0, done.stderr
    assert {name: (filled / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    assert sorted(path.name for path in (filled / "runs").iterdir()) == ["exp", "tensorboard"]


def test_pull_lists_the_runs_beside_a_record_that_is_none(filled, tmp_path):
    (tmp_path / "shared" / "runs").mkdir(parents=True)
    assert saap("push", "--remote", tmp_path / "shared", "--store", filled).returncode == 0
    (tmp_path / "shared" / "runs" / "mine.json").write_text("[]")
    done = saap("pull", "--remote", tmp_path / "shared", "--store", tmp_path / "two")
    assert (done.returncode, "r1" in done.stdout, "mine" in done.stdout) == (0, True, False), done.stderr
    assert "runs/mine.json is no record of that run (it is no JSON object): left out" in done.stderr
