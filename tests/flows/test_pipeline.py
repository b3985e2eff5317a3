"""Whole runs: reuse, crashes, damage and two writers, on a tiny model but with the real programs."""

import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import psutil
import pytest

from storage.artifacts import MANIFEST
from storage.runs import all_runs, read_run, read_stages
from storage.warehouse import Warehouse
from tasks.data import read_data
from tests.flows.conftest import KILLER, Command, ask, saap, without_server

pytestmark = pytest.mark.slow
STAGES = ["calibrate", "score", "fuse", "fluctuation", "prune", "recover", "evaluate", "speed"]


def run(config, *overrides):
    """The flow in this process: the records of its stages."""
    from flows.run import saap_run

    run_id = saap_run(str(config), list(overrides))
    store = config.parent / "store"
    assert read_run(store, run_id)["status"] == "completed"
    return list(read_stages(store, run_id))


def executed(stages):
    return {(s["stage"], s["variant"], s["benchmark"]) for s in stages if not s["cached"]}


def manifests(store):
    return {str(f.relative_to(store)): json.loads(f.read_text())["finished_at"] for f in store.glob(f"*/*/{MANIFEST}")}


def results(store):
    """Everything a run found that does not depend on time."""
    last = "where run_id = (select max(run_id) from runs)"
    queries = [
        f"select variant, benchmark, metric, value, stderr, n from metrics {last}",
        f"select layer, kind, unit, parameters, asi from groups {last}",
        f"select layer, kind, units, kept from widths {last}",
        f"select step, loss from training {last}",
        "select sample, layer, kind, unit, vector, element from importance",
    ]
    with Warehouse(store).reading() as connection:
        Warehouse(store).show_importance(connection)
        return [sorted(connection.execute(query).fetchall()) for query in queries]


@pytest.fixture
def undisturbed(config, store, prefect_server):
    """The results of a run that nothing disturbed, made in another store."""
    other = config.parent / "undisturbed"
    run_ = saap("run", config, "--store", other)
    assert run_.returncode == 0, run_.stderr
    return results(other)


def test_a_rerun_executes_nothing_and_a_change_executes_what_depends_on_it(config, store, prefect_server):
    everything = executed(run(config))
    assert {stage for stage, *_ in everything} == set(STAGES)
    assert len(everything) == 7 + 3 * 2
    assert executed(run(config)) == set()
    after_prune = {step for step in everything if step[0] in ("prune", "recover", "speed")} | {
        step for step in everything if step[1] in ("pruned", "recovered")
    }
    assert executed(run(config, "prune.ratio=0.3")) == after_prune
    more = 'evaluate.benchmarks=["arc_easy", "wikitext2", "piqa"]'
    assert executed(run(config, more)) == {("evaluate", v, "piqa") for v in ("dense", "pruned", "recovered")}
    reseeded = executed(run(config, "calibrate.seed=1"))
    assert reseeded == {step for step in everything if step[1] != "dense"}

    rows = ask(store, "select stage, computed, reused from stage_reuse where stage = 'score'")
    assert rows == [{"stage": "score", "computed": "2", "reused": "3"}]
    with Warehouse(store).reading() as connection:
        grown = connection.execute("select count(*) from metrics").fetchall()
    before = results(store)
    done = saap("rebuild", "--store", store)
    assert done.returncode == 0, done.stderr
    assert results(store) == before
    with Warehouse(store).reading() as connection:
        assert connection.execute("select count(*) from metrics").fetchall() == grown


def test_killed_in_every_stage_the_same_command_finishes_with_the_same_results(config, store, undisturbed):
    published: dict[str, float] = {}
    for stage in STAGES:
        done = saap("run", config, program=(KILLER, stage))
        assert done.returncode == -signal.SIGKILL, done.stderr
        now = manifests(store)
        assert now.items() >= published.items(), "what was published was made again"
        assert any(store.glob(f"{stage}/.draft-*")), f"{stage} was not in the middle of it"
        published = now
    done = saap("run", config)
    assert done.returncode == 0, done.stderr
    assert manifests(store).items() >= published.items()
    assert not list(store.glob("*/.draft-*"))
    assert results(store) == undisturbed
    statuses = [read_run(store, run_id)["status"] for run_id in all_runs(store)]
    assert statuses == ["killed"] * len(STAGES) + ["completed"]


def test_a_damaged_and_a_deleted_artifact_are_noticed_set_aside_and_rebuilt(config, store, prefect_server):
    run(config)
    before = results(store)
    importance = next(store.glob("score/*/importance.parquet"))
    importance.write_bytes(importance.read_bytes()[:-7])
    shutil.rmtree(next(store.glob("prune/*")))
    again = executed(run(config))
    assert {stage for stage, *_ in again} == {"score", "prune"}
    assert [p.name.partition("-")[0] for p in (store / "damaged").iterdir()] == ["score"]
    assert results(store) == before


def test_two_runs_at_once_share_the_work_and_lose_nothing(config, store, undisturbed):
    both = [Command(("run", config), environment=without_server(), merged=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    runs = all_runs(store)
    assert len(runs) == 2
    first, second = (executed(read_stages(store, run_id)) for run_id in runs)
    assert not first & second
    assert len(first | second) == 13
    assert results(store) == undisturbed
    assert ask(store, "select count(*) as n, count(distinct run_id) as runs from metrics") == [{"n": "18", "runs": "2"}]
    assert ask(store, "select count(*) as n from stage_runs") == [{"n": "26"}]


def test_a_killed_run_takes_its_own_prefect_server_with_it(config, store):
    program = [sys.executable, "tests/flows/kill.py", "calibrate", "run", str(config)]
    done = subprocess.run(
        program, env=without_server(), capture_output=True, text=True, timeout=600
    )  # returns: no open pipe
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 20
    while _servers(store) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _servers(store) == []


def _servers(store):
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if process.environ().get("PREFECT_HOME") == str(store / "prefect"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_run_shows_up_readable_in_prefect(config, store, prefect_server):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    name = f"readable: {tomllib.loads(config.read_text())['model']['path']} at 0.2"
    stages = run(config, "name=readable")
    with get_client(sync_client=True) as client:
        (flow_run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name={"any_": [name]}))
        deadline = time.monotonic() + 30  # the server records task runs from events, a moment later
        names: set[str] = set()
        while len(names) < len(stages) and time.monotonic() < deadline:
            names = {r.name for r in client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))}
            time.sleep(0.2)
        assert {"score", "evaluate pruned arc_easy", "speed"} <= names
        assert len(names) == len(stages)
        of_run = FlowRunFilter(id={"any_": [flow_run.id]})
        (shown,) = [a for a in client.read_artifacts(flow_run_filter=of_run) if a.type == "table"]
    rows = json.loads(shown.data)
    assert [row["variant"] for row in rows] == ["dense", "pruned", "recovered"]
    with Warehouse(store).reading() as connection:
        query = "select value from metrics where variant = 'pruned' and benchmark = 'arc_easy' and papers"
        ((value,),) = connection.execute(query).fetchall()
    assert rows[1]["ARC-e"] == f"{100 * value:.1f}"


def test_a_bloom_runs_through_every_stage_but_recovery(config, store, tiny_folder, tmp_path, prefect_server):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=64, n_layer=6, n_head=4)).save_pretrained(
        tmp_path / "bloom"
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "bloom")
    done = executed(run(config, f"model.path={tmp_path / 'bloom'}", "recover.recipe=none"))
    assert {stage for stage, *_ in done} == set(STAGES) - {"recover"}
    rows = ask(store, "select variant, value from metrics where benchmark = 'wikitext2' order by variant")
    assert [row["variant"] for row in rows] == ["dense", "pruned"]
    assert all(1 < float(row["value"]) < 1e4 for row in rows)


def test_a_run_recovers_on_three_kinds_of_text_with_its_own_file_of_prose(config, store, tmp_path, prefect_server):
    config.write_text(config.read_text().replace("examples = 8, prose = 0, own = 0, ", ""))
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"text": f"Part {n}. " + "The river ran on. " * 90}) + "\n" for n in range(6)))
    run(config, f"recover.prose_from={prose}", "recover.max_length=200", "recover.epochs=0.2", "evaluate.variants=[]")
    (made,) = [json.loads(file.read_text())["summary"] for file in store.glob(f"recovery_text/*/{MANIFEST}")]
    rows = len(read_data("mini", "recovery"))
    assert made == {"prose": 6, "prose_wanted": round(0.3 * rows), "own": round(0.6 * rows) - round(0.3 * rows)}
    (trained,) = ask(store, "select count(*) as steps from training where loss is not null")
    assert int(trained["steps"]) > 1
