"""A sweep as one graph, run in one process and in several: the same results, and failures that stay where they are."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.combinations import combinations
from flows.graph import Graph
from flows.job import prepare_all
from flows.places import Slots, beside, gpu_of, model_of
from flows.sweep import saap_sweep
from storage.artifacts import MANIFEST
from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tasks.compute import compute_settings, placed
from tasks.config import ConfigError, load_config
from tests.flows.conftest import Command, at_work_in, saap
from tests.flows.test_cli import refused

PROCESSES = ("execute.runner='processes'", "execute.slots=2")
QUICK = ("recover.recipe='none'", "evaluate.benchmarks=['wikitext2']", "speed.runs=0")
PLACES = pytest.mark.parametrize("place", [(), PROCESSES], ids=["serial", "processes"])


def swept(config, table):
    config.write_text(f"sweep = {table}\n" + config.read_text())
    return config


def manifests(store):
    return {f.parent.name: json.loads(f.read_text()) for f in store.glob(f"*/*/{MANIFEST}")}


def rows(store):
    """What a sweep found, but for run ids and times, in the order of its runs' settings."""
    with Warehouse(store).reading() as connection:
        return {
            table: sorted(
                str(row)  # a NaN is none of the others
                for row in connection.execute(
                    f"select ratio, t.* exclude ({without}) from {table} t join runs using (run_id)"
                ).fetchall()
            )
            for table, without in {
                "metrics": "run_id",
                "groups": "run_id",
                "widths": "run_id",
                "training": "run_id, tokens_per_s",
                "stage_runs": "run_id, cached, seconds, finished_at",
            }.items()
        }


def test_the_graph_of_a_sweep_has_each_step_once_and_after_what_it_takes(config):
    swept(config, '{ "prune.ratio" = [0.2, 0.3, 0.4] }')
    jobs = prepare_all(str(config), combinations(str(config)), ())
    graph = Graph(jobs)
    of_a_run = len(jobs[0].steps)
    shared = [reference for reference, runs in graph.needed.items() if len(runs) == 3]
    assert len(graph.steps) == len(shared) + 3 * (of_a_run - len(shared))
    assert {stage for stage, _ in shared} == {"calibrate", "score", "fuse", "fluctuation", "evaluate"}
    before: set[tuple[str, str]] = set()
    for reference, step in graph.steps.items():
        assert {(stage, key) for _, stage, key in step.inputs} <= before
        before.add(reference)


def test_a_step_that_measures_the_machine_runs_beside_nothing(config):
    steps = prepare_all(str(swept(config, '{ "prune.ratio" = [0.2] }')), combinations(str(config)), ())[0].steps
    (speed,) = (step for step in steps if step.stage == "speed")
    first, second = steps[:2]
    assert beside([first, speed], []) == [first]
    assert beside([first, second], [first]) == [first, second]
    assert beside([speed], [first]) == []
    assert beside([first], [speed]) == []
    assert beside([speed, speed], []) == [speed]


def test_each_slot_sees_a_gpu_of_its_own_and_its_share_of_the_cores(config, monkeypatch):
    for visible, seen in ((None, ["0", "1"]), ("3,5", ["3", "5"]), ("3", ["3", ""]), ("", ["", ""])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu_of(slot) for slot in (0, 1)] == seen
    config.write_text(config.read_text().replace(", threads = 1", ""))
    step = prepare_all(str(swept(config, '{ "prune.ratio" = [0.2] }')), combinations(str(config)), ())[0].steps[0]
    every = torch.get_num_threads()
    assert compute_settings(placed(step, "", 1))["threads"] == torch.get_num_threads() == 1
    compute_settings(step)
    assert torch.get_num_threads() == every


def test_a_slot_is_given_steps_of_the_model_that_it_has(config, tiny_folder, tmp_path):
    folders = [str(shutil.copytree(tiny_folder, tmp_path / name)) for name in "abc"]
    swept(config, f'{{ "model.path" = {folders} }}')
    jobs = prepare_all(str(config), combinations(str(config)), ())
    score = [next(step for step in job.steps if step.stage == "score") for job in jobs]
    calibrate = jobs[0].steps[0]
    assert [model_of(step) for step in (*score, calibrate)] == [*folders, None]
    slots = Slots(2)
    first, second = slots._slots
    first.model, second.model = folders[:2]
    assert slots._slot_for(score[0]) is first
    assert slots._slot_for(score[1]) is second
    second.step = calibrate
    assert slots.choose([score[1], score[2], score[0]]) is score[0]
    assert slots.choose([score[1], score[2]]) is score[2]  # no slot has it
    assert slots.choose([score[1]]) is score[1]  # rather than do nothing
    assert slots._slot_for(score[1]) is first
    first.step = score[1]
    assert slots.choose([score[0]]) is None


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["execute.slots=2"], "processes"),
        (["execute.address='h:1'"], "ray"),
        ([*PROCESSES, "compute.device='cuda:0'"], "GPU of its own"),
        ([*PROCESSES, "compute.launch='--multi_gpu'"], "compute.launch"),
        ([*PROCESSES, "compute.device='cuda'"], "GPUs"),
    ],
)
def test_what_a_place_cannot_do_is_refused(config, overrides, word):
    refused(saap("plan", config, *(word for override in overrides for word in ("--set", override))), word)


def test_a_store_and_a_place_are_no_axes(config):
    for axis in ('"execute.slots" = [1, 2]', 'store = ["a", "b"]', 'store_remote = ["s3://a/b"]'):
        original = config.read_text()
        with pytest.raises(ConfigError, match="whole sweep"):
            combinations(str(swept(config, f"{{ {axis} }}")))
        config.write_text(original)


def test_where_steps_run_is_in_no_key_but_that_of_a_speed(config):
    from flows.dag import build

    settings = (), PROCESSES, ("execute.runner='ray'",)
    here, processes, ray = ({step.label: step.key for step in build(load_config(config, one))} for one in settings)
    assert here == processes
    # a node of Ray measures speed, and this machine may be another
    assert {label for label, key in ray.items() if key != here[label]} == {"speed"}


@pytest.mark.slow
def test_processes_find_what_one_process_finds_and_measure_alone(config, tmp_path, prefect_server):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime

    began = datetime.datetime.now(datetime.UTC)  # other tests use the same server
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    names = {"serial": (), "processes": PROCESSES}
    for name, place in names.items():
        assert len(saap_sweep(str(config), [f"store='{tmp_path / name}'", *place])) == 2
    assert rows(tmp_path / "serial") == rows(tmp_path / "processes")
    made = {name: manifests(tmp_path / name) for name in names}
    assert made["serial"].keys() == made["processes"].keys()
    for key, manifest in made["serial"].items():
        if manifest["stage"] in ("prune", "recover"):
            files = {f: about for f, about in manifest["files"].items() if f.endswith((".safetensors", "plan.parquet"))}
            assert files.items() <= made["processes"][key]["files"].items()
    spans = [(m["finished_at"] - m["seconds"], m["finished_at"], m["stage"]) for m in made["processes"].values()]
    for start, end, stage in spans:
        if stage == "speed":
            assert [other for other in spans if other[0] < end and start < other[1]] == [(start, end, stage)]
    with get_client(sync_client=True) as client:
        since = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=began))
        flow_runs = [run for run in client.read_flow_runs(flow_run_filter=since) if run.name.startswith("tiny: ")]
    assert {run.state_name for run in flow_runs} == {"Completed"}
    assert sum(run.name.endswith(" at 0.3") for run in flow_runs) == 2


@pytest.mark.slow
@PLACES
def test_a_step_that_fails_fails_the_runs_that_need_it_and_no_others(
    config, store, tmp_path, tiny_folder, prefect_server, place
):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "broken")
    swept(config, f'{{ "model.path" = ["{tiny_folder}", "{tmp_path / "broken"}"], "prune.ratio" = [0.2, 0.3] }}')
    with pytest.raises(ConfigError, match="2 of 4 runs failed") as failed:
        saap_sweep(str(config), [*QUICK, *place])
    assert "not finite" in str(failed.value)
    found = {}
    for run_id in all_runs(store):
        run = read_run(store, run_id)
        found[run["model"], run["ratio"]] = (
            run["status"],
            "not finite" if "not finite" in str(run["error"]) else run["error"],
        )
    assert found == {
        **{(str(tiny_folder), ratio): ("completed", None) for ratio in (0.2, 0.3)},
        **{(str(tmp_path / "broken"), ratio): ("failed", "not finite") for ratio in (0.2, 0.3)},
    }


def start(*arguments):
    return Command(arguments, merged=True)


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_step_and_the_same_command_goes_on(config, store, prefect_server):
    from prefect.client.orchestration import get_client

    def recoveries():
        with get_client(sync_client=True) as client:
            return {run.id: run.state_name for run in client.read_task_runs(limit=200) if run.name == "recover"}

    others = recoveries()
    long = [w for o in (*PROCESSES, *QUICK[1:], "recover.epochs=60") for w in ("--set", o)]
    swept(config, '{ "recover.recipe" = ["none", "lora"] }')
    sweep = start("sweep", config, *long)
    worker = at_work_in(store, "recover")
    assert worker in {child.pid for child in psutil.Process(sweep.pid).children(recursive=True)}
    os.kill(worker, signal.SIGKILL)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 2, output
    assert "1 of 2 runs failed" in output
    assert "died in recover" in output
    assert "Traceback" not in output
    assert sorted(read_run(store, run_id)["status"] for run_id in all_runs(store)) == ["completed", "failed"]
    assert "Running" not in [state for run, state in recoveries().items() if run not in others]
    made = manifests(store)
    again = saap("sweep", config, *long)
    assert again.returncode == 0, again.stderr
    assert "windows of 128 tokens were not measured" in " ".join(again.stdout.split())
    assert manifests(store).items() >= made.items(), "what was made is made again"


def starting_in(sweep):
    """Until there is a worker process, which is not ready yet."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for child in psutil.Process(sweep.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("spawn_main" in word for word in child.cmdline()):
                    return
        time.sleep(0.02)
    raise AssertionError("no worker starts")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "at work"])
def test_a_killed_sweep_takes_its_workers_with_it(config, store, prefect_server, when):
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    sweep = start("sweep", config, "--set", "recover.epochs=1000", *(w for o in PROCESSES for w in ("--set", o)))
    if when == "starting":
        starting_in(sweep)
    else:
        at_work_in(store, "recover")
    workers = psutil.Process(sweep.pid).children(recursive=True)
    sweep.kill()
    sweep.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
